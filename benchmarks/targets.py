"""The project's targets for reconstruction, and where benchmarks.quality finds them: ratios within one task, and the
worst over the tasks that they are for.

`python -m benchmarks.targets docs/benchmarks/quality-*.json` prints the tables of docs/quality.md from saved results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TARGETS: dict[str, Any] = {
    "full_vs_nested": 0.84,
    "prefixes_vs_nested": [0.97, 0.87],
    "full_vs_flat": 0.91,
    "own_flat": 1.04,
    "tokens_to_match": 0.25,
    "seconds_to_match": 0.35,
    "skip_vs_skip": 0.90,
    "dead": 0.02,
    "l0": 0.03,
}
"""Largest wanted value of each figure."""
TARGET_TASKS = ("smollm2", "gemma3", "smollm2-layer9", "smollm2-layer11")


def best_nested_peer(means: dict[str, dict[str, Any]]) -> str | None:
    """The nested peer with the least full-dictionary FVU; `means` are those of `Result.means` by contender."""
    there = [name for name in means if _kind(name) == "nested"]
    return min(there, key=lambda name: means[name]["fvu"][-1]) if there else None


def figures(task: dict[str, Any]) -> dict[str, Any]:
    """What TARGETS names, of one task as `benchmarks.quality.run` measured it; only what its contenders allow.

    FVU and L0 without massive tokens, means over seeds.
    full_vs_nested, prefixes_vs_nested: our nested FVU over the best nested peer's, of all features and of each smaller
    prefix; every prefix has its own best peer.
    full_vs_flat: over the best peer's that is not nested. own_flat: over ours that is not nested.
    tokens_to_match: least share of the captured tokens with which ours has the best nested peer's FVU, None if not even
    all do. seconds_to_match: CPU seconds of capturing and training those over the peer's of capturing all tokens and
    training; seconds_to_match_wall the same in wall time, which others on the machine disturb.
    skip_vs_skip: ours with a skip connection over the best peer's. dead: our share of dead features. l0: our distance
    from k, as a share of k.
    """
    means = {result["contender"]: result["means"] for result in task["results"]}
    if "mtc" not in means:
        return {}
    ours, found = means["mtc"], {}
    nested, flat, skip = (
        [means[name]["fvu"] for name in means if _kind(name) == kind] for kind in ("nested", "flat", "skip")
    )
    if nested:
        ratios = [mine / min(peer[p] for peer in nested) for p, mine in enumerate(ours["fvu"])]
        found |= {"full_vs_nested": ratios[-1], "prefixes_vs_nested": ratios[:-1]}
    if flat:
        found["full_vs_flat"] = ours["fvu"][-1] / min(fvu[-1] for fvu in flat)
    if "mtc, not nested" in means:
        found["own_flat"] = ours["fvu"][-1] / means["mtc, not nested"]["fvu"][-1]
    if skip and "mtc, skip" in means:
        found["skip_vs_skip"] = means["mtc, skip"]["fvu"][-1] / min(fvu[-1] for fvu in skip)
    peer = best_nested_peer(means)
    if peer and "shares" in task:
        found |= _to_match(task, means[peer], [*task["shares"], {"share": 1.0, "means": ours}])
    return found | {"dead": ours["dead"], "l0": abs(ours["l0"] / task["task"]["k"] - 1)}


def describe(by_task: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each figure: its value on every task, the worst on those of TARGET_TASKS (or of all, if none of them was run),
    the target, and whether it is met; `complete` says whether all of TARGET_TASKS were run."""
    wanted = [name for name in TARGET_TASKS if name in by_task] or list(by_task)
    found = {}
    for figure, target in TARGETS.items():
        values = {task: figures[figure] for task, figures in by_task.items() if figure in figures}
        chosen = [values[task] for task in wanted if task in values]
        if not chosen:
            continue
        worst = _worst(chosen)
        pairs = zip(worst, target, strict=True) if isinstance(target, list) else [(worst, target)]
        met = all(value is not None and value <= limit for value, limit in pairs)
        found[figure] = {"tasks": values, "worst": worst, "target": target, "met": met}
        found[figure]["complete"] = set(TARGET_TASKS) <= set(values)
    return found


def tables(tasks: dict[str, dict[str, Any]]) -> str:
    """Markdown: a table for each task, then the targets."""
    lines = []
    for name, task in tasks.items():
        about, line = task["task"], task["linear_map"]
        lines += [
            f"### {name}: {about['model']} layer {about['layer']}, {about['train_tokens']:,} captured tokens, "
            f"{100 * task['massive_share']:.2f} % massive (linear map: FVU {line['fvu']:.3f}, of all tokens "
            f"{line['fvu_all']:.3f})",
            "",
            "| | learning rate | FVU per prefix | L0 | dead | train, s | CPU, s | FVU of all tokens | its L0 |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        shares = [{"contender": f"mtc, {s['share']:g} of the tokens", "lr": None, **s} for s in task.get("shares", [])]
        for result in [*task["results"], *shares]:
            means, lr = result["means"], "" if result["lr"] is None else f"{result['lr']:g}"
            fvu, fvu_all = (" / ".join(f"{value:.3f}" for value in means[key]) for key in ("fvu", "fvu_all"))
            lines.append(
                f"| {result['contender']} | {lr} | {fvu} | {means['l0']:.2f} | {100 * means['dead']:.1f} % "
                f"| {means['seconds']:.0f} | {means['cpu_seconds']:.0f} | {fvu_all} | {means['l0_all']:.2f} |"
            )
        lines.append("")
    lines += [f"| | {' | '.join(tasks)} | worst | target |", f"| --- |{' --- |' * len(tasks)} --- | --- |"]
    for figure, about in describe({name: task["figures"] for name, task in tasks.items()}).items():
        values = [shown(about["tasks"][name]) if name in about["tasks"] else "" for name in tasks]
        target = f"{shown(about['target'])}, {verdict(about)}"
        lines.append(f"| {figure} | {' | '.join(values)} | {shown(about['worst'])} | {target} |")
    return "\n".join(lines)


def verdict(about: dict[str, Any]) -> str:
    """Whether a figure of `describe` meets its target, and if not all of its tasks were run."""
    return ("met" if about["met"] else "not met") + ("" if about["complete"] else ", not all tasks")


def shown(value: Any) -> str:
    """A figure to print."""
    if isinstance(value, list):
        return ", ".join(shown(each) for each in value)
    return "out of reach" if value is None else f"{value:.3f}"


def _kind(contender: str) -> str:
    """ "ours", or what a peer is: "nested", "flat" or, flat too, "skip"."""
    library, *variants = contender.split(", ")
    if library == "mtc":
        return "ours"
    if library in ("sae-lens", "dictionary-learning"):
        return "nested"
    return "skip" if "skip" in variants else "flat"


def _to_match(task: dict[str, Any], peer: dict[str, Any], shares: list[dict[str, Any]]) -> dict[str, Any]:
    matching = [s for s in shares if s["means"]["fvu"][-1] <= peer["fvu"][-1]]
    if not matching:
        return {"tokens_to_match": None, "seconds_to_match": None, "seconds_to_match_wall": None}
    least, tokens, cost = min(matching, key=lambda s: s["share"]), task["task"]["train_tokens"], task["capture"]

    def ratio(unit: str) -> float:
        capture = tokens * cost[unit] / cost["tokens"]
        return (least["share"] * capture + least["means"][unit]) / (capture + peer[unit])

    return {
        "tokens_to_match": least["share"],
        "seconds_to_match": ratio("cpu_seconds"),
        "seconds_to_match_wall": ratio("seconds"),
    }


def _worst(values: list[Any]) -> Any:
    """The largest, of lists place by place; None, which is out of reach, is larger than everything."""
    if isinstance(values[0], list):
        return [_worst(list(column)) for column in zip(*values, strict=True)]
    return None if None in values else max(values)


def read(file: str) -> dict[str, dict[str, Any]]:
    """The tasks of a file that `benchmarks.quality --save` wrote. Raises SystemExit for one of an older version."""
    tasks: dict[str, dict[str, Any]] = json.loads(Path(file).read_text())["tasks"]
    if not all("figures" in task for task in tasks.values()):
        again = f"python -m benchmarks.quality --task {' '.join(tasks)} --peers --save"
        raise SystemExit(f"{file} is of before figures were without massive tokens; to make it anew: {again}")
    return tasks


if __name__ == "__main__":
    print(tables({name: task for file in sys.argv[1:] for name, task in read(file).items()}))
