"""What `kubectl kustomize` prints, for just the features that k8s/ uses; any other is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Document = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "configMapGenerator"}
KNOWN |= {"generatorOptions", "patches"}


def render(directory: Path) -> list[Document]:
    """The documents of a kustomization, with those of its bases and components."""
    settings = yaml.safe_load((directory / "kustomization.yaml").read_text())
    if unknown := settings.keys() - KNOWN:
        raise ValueError(f"{directory}: {sorted(unknown)} is not rendered here")
    documents: list[Document] = []
    for name in settings.get("resources", ()):
        path = directory / name
        documents += render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for name in settings.get("components", ()):
        documents += render(directory / name)
    for generator in settings.get("configMapGenerator", ()):
        _generate(directory, generator, settings.get("generatorOptions", {}), documents)
    for patch in settings.get("patches", ()):
        if patch.keys() != {"target", "patch"} or patch["target"].keys() != {"kind"}:
            raise ValueError(f"{directory}: {patch} is not rendered here")
        chosen = [i for i, document in enumerate(documents) if document["kind"] == patch["target"]["kind"]]
        if not chosen:
            raise ValueError(f"{directory}: no {patch['target']['kind']} to patch")
        operations = jsonpatch.JsonPatch(yaml.safe_load(patch["patch"].strip()))
        for i in chosen:
            documents[i] = operations.apply(documents[i])
    if "namespace" in settings:
        for document in documents:
            if document["kind"] != "Namespace":
                document["metadata"]["namespace"] = settings["namespace"]
    return documents


def _generate(directory: Path, generator: Document, common: Document, documents: list[Document]) -> None:
    options = common | generator.get("options", {})
    if options.keys() - {"disableNameSuffixHash", "labels"} or not options["disableNameSuffixHash"]:
        raise ValueError(f"{directory}: {options} is not rendered here")
    if generator.keys() - {"name", "namespace", "behavior", "files", "options"}:
        raise ValueError(f"{directory}: {generator} is not rendered here")
    metadata = {name: generator[name] for name in ("name", "namespace") if name in generator}
    if "labels" in options:
        metadata["labels"] = options["labels"]
    data = {name: (directory / name).read_text() for name in generator["files"]}
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    if generator.get("behavior") == "replace":
        documents[names.index(("ConfigMap", generator["name"]))] = made
    else:
        documents.append(made)
