"""What the identity benchmark found, in sentences: what was to come out, and what had no expected outcome."""

from __future__ import annotations


def interval(row: dict, measure: str, number: str = "{:.3f}", limit: str = "") -> str:
    """A mean with its interval, such as ``0.708 [0.647, 0.765]``; a dash where the row has no such measure."""
    if row[measure] is None:
        return "–"
    low, high = ((limit or number).format(value) for value in row[f"{measure}_ci"])
    return f"{number.format(row[measure])} [{low}, {high}]"


def verdicts(result: dict) -> list[str]:
    """What the method should show, each with yes or no and the numbers; only what this run measured."""
    rows = {row["name"]: row for row in result["rows"]}
    said: list[tuple[bool, str]] = []
    best, plain, one = rows.get("4 references"), rows.get("no face"), rows.get("1 reference")
    if best and plain:
        times = best["top1"] / result["chance"]
        said.append((times >= 20, f"20 × chance: {best['top1']:.3f}, which is {times:.0f} ×"))
        of_plain = f", so {best['top1'] / plain['top1']:.0f} ×" if plain["top1"] else ""
        text = f"5 × the model without a face, which has {plain['top1']:.3f}{of_plain}"
        said.append((best["top1"] >= 5 * plain["top1"], text))
        text = f"prompt accuracy within 10 points: {plain['prompt']:.3f} → {best['prompt']:.3f}"
        said.append((plain["prompt"] - best["prompt"] <= 0.10, text))
        said += _drawing(plain, best)
    for name in ("4 references", "4 references, equal colours"):
        if row := rows.get(name):
            share, least = row["top1"] / max(row["ceiling"], 1e-9), 0.5 if "equal" in name else 0.85
            text = f"{name} at least {least} of the ceiling: {row['top1']:.3f} of {row['ceiling']:.3f}, {share:.2f}"
            said.append((share >= least, text))
    if best and one:
        near = f"similarity {best['similarity']:.3f} against {one['similarity']:.3f}"
        text = f"4 references better than 1: {best['top1']:.3f} against {one['top1']:.3f}, {near}"
        better = best["top1"] > one["top1"]
        apart = {row["name"]: row for row in result["differences"]}.get("4 references − 1 reference")
        if apart:  # picture by picture
            better, text = apart["top1_ci"][0] > 0, f"{text}; top-1 {interval(apart, 'top1', '{:+.3f}')}"
        said.append((better, text))
    for row in result.get("regions") or ():
        if row["people"] == 2:
            text = (
                f"two people in one picture ({row['adapter']}) each at 0.9 of the rate of one: {row['of_single']:.2f}"
            )
            text += f"; taken for one another at most in 0.05: {row['confused']:.3f}"
            said.append((row["of_single"] >= 0.9 and row["confused"] <= 0.05, text))
    losses = {name: rows[f"{name} loss"] for name in ("regularised", "standard", "mask") if f"{name} loss" in rows}
    if len(losses) == 3:
        least = min(losses, key=lambda name: losses[name]["background"])
        drift = ", ".join(f"{name} {row['background']:.4f}" for name, row in losses.items())
        top1 = ", ".join(f"{name} {row['top1']:.3f}" for name, row in losses.items())
        text = f"the regularised loss keeps the background best: drift {drift}; top-1 {top1}"
        said.append((least == "regularised", text))
    return [f"- {'yes' if holds else '**no**'}: {text}" for holds, text in said]


def _drawing(plain: dict, best: dict) -> list[tuple[bool, str]]:
    """What the frozen model draws, and whether the face costs any attribute of the prompt."""
    said = []
    if plain["eyes"] is not None:
        said.append((plain["eyes"] >= 0.85, f"two sound eyes in 0.85 of the pictures: {interval(plain, 'eyes')}"))
    own, faced = plain["attributes"], best["attributes"]
    text = f"the expression told 0.3 above chance, which is 0.25: {own['expression']:.3f}"
    said.append((own["expression"] >= 0.55, text))
    worst = min(own, key=lambda name: faced[name] - own[name])
    text = f"no attribute more than 2 points below the model without a face: {worst.replace('_', ' ')} "
    said.append((faced[worst] >= own[worst] - 0.02, f"{text}{own[worst]:.3f} → {faced[worst]:.3f}"))
    return said


def findings(result: dict) -> list[str]:
    """What the comparisons found that have no expected outcome; only what this run measured."""
    found, rows = [], {row["name"]: row for row in result["rows"]}
    apart = {row["name"]: row for row in result["differences"]}
    if own := apart.get("retrieval − no retrieval"):
        found.append(
            "- retrieval (the reference is another photo of the person) instead of the target's own face: top-1 "
            f"{interval(own, 'top1', '{:+.3f}')}, prompt {own['prompt']:+.3f}, background {own['background']:+.4f}"
        )
    cheaper = [row for name, row in rows.items() if f"{name} − full branches" in apart]
    if (full := rows.get("full branches")) and cheaper:
        # as good: the interval of the paired difference does not lie below zero
        equal = [row for row in cheaper if apart[f"{row['name']} − full branches"]["top1_ci"][1] >= 0]
        cheapest = min([full, *equal], key=lambda row: row["gflop"])
        what = "none is cheaper than full branches"
        if cheapest is not full:
            share, parameters = (cheapest[cost] / full[cost] for cost in ("gflop", "parameters"))
            what = f"{cheapest['name']}, {share:.0%} of the operations and {parameters:.0%} of the parameters, "
            what += f"top-1 {cheapest['top1']:.3f} against {full['top1']:.3f}"
        found.append(f"- the cheapest branch that is not worse than full branches, picture by picture: {what}")
    if pulls := [name for name in apart if name.startswith("4 references, identity guidance")]:
        own, scale = apart[pulls[-1]], pulls[-1].split(" − ")[0].split()[-1]
        found.append(
            f"- identity guidance with scale {scale}: top-1 {interval(own, 'top1', '{:+.3f}')}, similarity "
            f"{interval(own, 'similarity', '{:+.3f}')}, prompt {interval(own, 'prompt', '{:+.3f}')}"
        )
    return found
