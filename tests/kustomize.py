"""What `kubectl kustomize` prints, for the features that k8s/ uses; any other is an error.

Generators come after resources and components, then patches, the namespace, images and last replacements, as in
kustomize; test_k8s.py compares with the real one where it is installed.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]

FIELDS = {
    "apiVersion", "kind", "namespace", "resources", "components", "generatorOptions", "configMapGenerator", "patches",
    "images", "replacements",
}  # fmt: skip
WITHOUT_NAMESPACE = {"Namespace"}


class Unsupported(ValueError):
    """k8s/ uses something of kustomize that this builder does not know."""


def build(directory: Path) -> list[Document]:
    """The documents of the kustomization in `directory`."""
    return _build(directory.resolve(), [])


def _build(directory: Path, documents: list[Document]) -> list[Document]:
    """`documents` is what a component is applied to."""
    settings = yaml.safe_load((directory / "kustomization.yaml").read_text())
    _only(settings, FIELDS, "kustomization.yaml")
    for name in settings.get("resources", []):
        documents = documents + _resource(directory / name)
    for name in settings.get("components", []):
        documents = _build((directory / name).resolve(), documents)
    for generator in settings.get("configMapGenerator", []):
        options = settings.get("generatorOptions", {}) | generator.get("options", {})
        documents = _generate(documents, generator, options, directory)
    for patch in settings.get("patches", []):
        documents = _patch(documents, patch, directory)
    for document in documents:
        if "namespace" in settings and document["kind"] not in WITHOUT_NAMESPACE:
            document["metadata"]["namespace"] = settings["namespace"]
        for image in settings.get("images", []):
            _rename(document, image)
    for replacement in settings.get("replacements", []):
        _replace(documents, replacement)
    names = [(d["kind"], d["metadata"]["name"], d["metadata"].get("namespace")) for d in documents]
    if len(set(names)) < len(names):
        raise ValueError(f"{directory} has two documents of one name: {sorted(names, key=str)}")
    return documents


def _resource(path: Path) -> list[Document]:
    if path.is_dir():
        return build(path)
    # Anchors make PyYAML share objects; a patch must change one of them only.
    return [copy.deepcopy(_unshared(document)) for document in yaml.safe_load_all(path.read_text()) if document]


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _generate(documents: list[Document], generator: Document, options: Document, directory: Path) -> list[Document]:
    _only(generator, {"name", "behavior", "files", "options"}, "configMapGenerator")
    _only(options, {"disableNameSuffixHash", "labels", "annotations"}, "generatorOptions")
    if options.get("disableNameSuffixHash") is not True:
        raise Unsupported("generators whose names have a hash")
    metadata = {"name": generator["name"]} | {k: options[k] for k in ("labels", "annotations") if k in options}
    data = {Path(name).name: (directory / name).read_text() for name in generator["files"]}
    made: Document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    same = [d for d in documents if (d["kind"], d["metadata"]["name"]) == ("ConfigMap", generator["name"])]
    behavior = generator.get("behavior", "create")
    if behavior not in ("create", "replace"):
        raise Unsupported(f"configMapGenerator.behavior {behavior}")
    if bool(same) != (behavior == "replace"):
        raise ValueError(f"configMapGenerator {generator['name']}: behavior {behavior}, but {len(same)} are there")
    if same:
        made["metadata"] = same[0]["metadata"] | made["metadata"]
    return [d for d in documents if d not in same] + [made]


def _patch(documents: list[Document], patch: Document, directory: Path) -> list[Document]:
    _only(patch, {"target", "patch", "path"}, "patches")
    _only(patch["target"], {"kind", "name"}, "patches.target")
    operations = yaml.safe_load(patch["patch"] if "patch" in patch else (directory / patch["path"]).read_text())
    targets = [d for d in documents if _selected(d, patch["target"])]
    if not targets:
        raise ValueError(f"a patch changes nothing: there is no {patch['target']}")
    if isinstance(operations, dict):
        if operations.get("$patch") != "delete" or set(operations) != {"apiVersion", "kind", "metadata", "$patch"}:
            raise Unsupported("strategic merge patches other than $patch: delete")
        return [d for d in documents if d not in targets]
    for target in targets:
        for operation in operations:
            _operate(target, _unshared(operation))
    return documents


def _operate(document: Document, operation: Document) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    kind = operation["op"]
    holder, key = _pointed(document, operation["path"])
    if kind == "copy":
        source, name = _pointed(document, operation["from"])
        kind, value = "add", copy.deepcopy(source[name])
    elif kind in ("add", "replace"):
        value = operation["value"]
    else:
        raise Unsupported(f"operation {kind} of a JSON patch")
    if isinstance(holder, list) and kind == "add":
        holder.insert(len(holder) if key == "-" else key, value)
        return
    if kind == "replace":
        holder[key]  # must be there
    holder[key] = value


def _pointed(document: Any, pointer: str) -> tuple[Any, Any]:
    """The container of what a JSON pointer names, and its key there."""
    *steps, last = [step.replace("~1", "/").replace("~0", "~") for step in pointer.removeprefix("/").split("/")]
    for step in steps:
        document = document[int(step) if isinstance(document, list) else step]
    return document, int(last) if isinstance(document, list) and last != "-" else last


def _rename(value: Any, image: Document) -> None:
    """The new name and tag of an image, in all containers of any kind."""
    _only(image, {"name", "newName", "newTag"}, "images")
    if isinstance(value, list):
        for inner in value:
            _rename(inner, image)
    elif isinstance(value, dict):
        for key, inner in value.items():
            for container in inner if key in ("containers", "initContainers") and isinstance(inner, list) else []:
                name, _, tag = container["image"].partition(":")
                if name == image["name"]:
                    container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
            _rename(inner, image)


def _replace(documents: list[Document], replacement: Document) -> None:
    _only(replacement, {"source", "targets"}, "replacements")
    source = replacement["source"]
    _only(source, {"kind", "name", "fieldPath"}, "replacements.source")
    (document,) = [d for d in documents if _selected(d, source)]
    ((holder, key),) = _found(document, source["fieldPath"])
    value = holder[key]
    for target in replacement["targets"]:
        _only(target, {"select", "fieldPaths"}, "replacements.targets")
        _only(target["select"], {"kind", "name"}, "replacements.targets.select")
        for path in target["fieldPaths"]:
            for selected in [d for d in documents if _selected(d, target["select"])]:
                for holder, key in _found(selected, path):
                    holder[key] = copy.deepcopy(value)


def _found(document: Any, path: str) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of what a field path names: names with dots escaped by a backslash, `*` for all of a list."""
    first, *rest = re.split(r"(?<!\\)\.", path, maxsplit=1)
    for key in range(len(document)) if first == "*" else [first.replace("\\.", ".")]:
        document[key]  # must be there
        if rest:
            yield from _found(document[key], rest[0])
        else:
            yield document, key


def _selected(document: Document, selector: Document) -> bool:
    name = selector.get("name")
    return document["kind"] == selector["kind"] and name in (None, document["metadata"]["name"])


def _only(given: Document, known: set[str], where: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise Unsupported(f"{where}: {', '.join(unknown)}")
