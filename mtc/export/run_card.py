"""The model card of a run that is pushed as it is: what it holds, how good it is, how to open it."""

from __future__ import annotations

import re

from mtc.export.card import closing, language_model, quality
from mtc.export.front_matter import Measured, front_matter
from mtc.storage import RunDirectory, load_analysis

FORMAT = "run"
"""What the metadata of such a card names as the format."""


def run_card(run: RunDirectory, repo: str, created: str, license: str | None = None, contact: str | None = None) -> str:
    """The card's text for `repo`, OWNER/NAME, from the run's configuration and analyses; `created` is ISO 8601.

    Raises RunError for an analysis of another version.
    """
    members, places = _measured(run), list(run.members())
    config, several = members[0].config, len(members) > 1
    layers = sorted({member.config.model.layer for member in members})
    what = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers"
    title = f"Matryoshka transcoder{'s' * several} of {what} of {config.model.name}"
    ours = {"run": run.run_id, "format": FORMAT}
    front = front_matter(run.run_id, members, ours, license, library="mtc")
    facts = [
        ("Language model", language_model(config)),
        ("Layers", ", ".join(map(str, layers))),
        ("Read", ", ".join(dict.fromkeys(f"`{m.config.model.source}`" for m in members))),
        ("Imitate", "`mlp_out`, what the MLP adds to the residual stream"),
        ("Run", f"`{run.run_id}`" + ", of weights that were imported, not trained in it" * members[0].imported),
    ]
    if not several:
        groups = list(config.transcoder.group_sizes)
        facts += [
            ("Dictionary", f"{config.transcoder.num_features:,} features, in nested groups {groups}"),
            ("Active features", f"about {config.transcoder.k} per token"),
        ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    figures = "\n\n".join(f"### {m.name}\n\n{quality(m)}" if several else quality(m) for m in members)
    return f"""{front}
# {title}

Sparse networks of one hidden layer that imitate the MLPs of a language model, so that their hidden units, the features,
can be read. The dictionary is nested: its first features are a transcoder of their own. This is a whole run of mtc:
configuration, weights, every feature's figures and examples, report, and a manifest with the digests of all files.

| | |
| --- | --- |
{table}

## How to open it

```python
{_opening(repo, places, several)}
```

`mlp_out = transcoder.decode(features)` imitates the MLP; inputs and outputs are raw activations.
`python -m serve.app --run hf://{repo}` answers over HTTP which features a text activates, and shows them in a browser.
The report is in `report/`. mtc leaves special tokens, such as the first one of a text (BOS), out of training and of all
figures.

## Held-out quality

{figures}

{closing(config, contact, _own_entry(run.run_id, repo, title, created))}"""


def _measured(run: RunDirectory) -> list[Measured]:
    members = run.members()
    return [
        Measured(
            config=(config := own.config()),
            analysis=load_analysis(own) if own.exists("analysis.json") else None,
            prefix=config.transcoder.num_features,
            name=name if len(members) > 1 else "",
            imported=own.exists("import.json"),
        )
        for name, own in members.items()
    ]


def _opening(repo: str, places: list[str], several: bool) -> str:
    which = f"/{places[0]}" if several else ""
    said = f"  # or {', '.join(places[1:4])}{', ...' if len(places) > 4 else ''}" if several else ""
    return f"""from mtc import load_transcoder, open_run

run = open_run("hf://{repo}{which}"){said}
transcoder = load_transcoder(run)
features = transcoder.encode(source)  # [tokens, d_model] -> [tokens, features]"""


def _own_entry(run_id: str, repo: str, title: str, created: str) -> str:
    key = re.sub(r"[^A-Za-z0-9]+", "-", run_id).strip("-").lower()
    return f"""@misc{{{key},
  title = {{{title}}},
  author = {{{{{repo.partition("/")[0]}}}}},
  howpublished = {{https://huggingface.co/{repo}}},
  year = {{{created[:4]}}}
}}
"""
