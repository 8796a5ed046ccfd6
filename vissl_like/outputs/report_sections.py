"""The blocks of report.html. Each takes the run folder and returns its block, or None where its files are missing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vissl_like.outputs import figures
from vissl_like.outputs.console import duration
from vissl_like.outputs.report_html import (
    as_text,
    bar_table,
    data_uri,
    folded_table,
    four_digits,
    image_class,
    picture,
    spaced,
)
from vissl_like.outputs.report_parts import parts
from vissl_like.outputs.run_folder import REPORT_FILE, RunFolder, Section, flatten
from vissl_like.outputs.writers import COORDINATES

#: Parts of metric names that stand in a tile at the top of the results, in this order.
HEADLINE_METRICS = ("top_1", "top1", "mAP", "nmi", "purity", "ari", "accuracy", "foreground_iou")
MAX_TILES = 8
#: Names of what was measured in training, at another time, or of something that the model is compared with.
_NOT_THE_RESULT = ("train_", "best_", "random_", "oracle_", "epoch0_", "without_")
#: Rows of long tables that are shown before the rest is folded away.
OPEN_ROWS = 12


def headline(run: RunFolder) -> str:
    """Recipe, duration and date, for the line under the title."""
    manifest = run.manifest
    parts = [f"<code>{escape(run.launch['recipe'])}</code>"] if run.launch.get("recipe") else []
    seconds = manifest.get("seconds")
    if isinstance(seconds, int | float):
        parts.append(f"{seconds:.0f} s" if seconds < 60 else f"{duration(seconds)} {'h' if seconds >= 3600 else 'min'}")
    if manifest.get("finished"):
        parts.append(escape(str(manifest["finished"])[:16].replace("T", " ")))
    return f'<span class="muted">{" · ".join(parts)}</span>'


def summary_table(run: RunFolder) -> Section | None:
    """The table of a pipeline (table.json: columns, rows, notes)."""
    content = run.json("table.json")
    if not content or not content.get("rows"):
        return None
    notes = "".join(f'<p class="muted">{escape(str(note))}</p>' for note in content.get("notes") or [])
    return Section(str(content.get("title") or "Summary"), bar_table(content["columns"], content["rows"]) + notes)


def results(run: RunFolder) -> Section | None:
    """Final metrics: the main ones as tiles, all of them in a table."""
    values = run.results
    if not values:
        return None
    # The table of a pipeline already shows the main ones.
    main = [] if (run.path / "table.json").is_file() else headline_keys(values)
    tiles = "".join(
        f'<div class="tile"><b>{four_digits(values[key])}</b><span>{escape(spaced(key))}</span></div>' for key in main
    )
    rows = [f'<td class="k">{escape(key)}</td><td>{as_text(value)}</td>' for key, value in values.items()]
    is_shown = tiles or (run.path / "table.json").is_file()
    table = folded_table(("metric", "value"), rows, open_rows=0 if is_shown else OPEN_ROWS, what="all {} metrics")
    return Section("Results", (f'<div class="tiles">{tiles}</div>' if tiles else "") + table)


def headline_keys(values: Mapping[str, Any]) -> list[str]:
    """The metrics that matter most, by name; at most eight."""
    numbers = [key for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    rank = {key: place for key in numbers if (place := _headline_place(key)) is not None}
    chosen = sorted(rank, key=lambda key: rank[key])
    return chosen[:MAX_TILES]


def _headline_place(key: str) -> int | None:
    """Where a metric stands in HEADLINE_METRICS by the last part of its name; values of something else stand nowhere."""
    name = key.rsplit("/", 1)[-1]
    places = [place for place, part in enumerate(HEADLINE_METRICS) if part in name]
    return places[0] if places and not name.startswith(_NOT_THE_RESULT) else None


def _first_of_each_kind(keys: list[str]) -> list[str]:
    """Without metrics that are variants of one before them."""
    return list({_headline_place(key): key for key in reversed(keys)}.values())[::-1]


def stages(run: RunFolder) -> Section | None:
    """A card per stage of a pipeline, with its main picture and a link to its own report."""
    if not run.stages:
        return None
    cards = []
    for stage in run.stages:
        style, text = stage.status
        keys = _first_of_each_kind(headline_keys(stage.results))[:3]
        numbers = "".join(
            f"<br><span>{escape(spaced(key))} <b>{four_digits(stage.results[key])}</b></span>" for key in keys
        )
        picture = next(
            (stage.path / "figures" / name for name in MAIN_FIGURES if (stage.path / "figures" / name).is_file()), None
        )
        image = f'<img class="{image_class(picture)}" src="{data_uri(picture)}" alt="">' if picture else ""
        inner = (
            f'<b>{escape(stage.path.name)}</b> <span class="muted">{escape(stage.engine.replace("_", " "))}</span><br>'
            f'<span class="{style}">{escape(text)}</span>{numbers}{image}'
        )
        has_page = (stage.path / REPORT_FILE).is_file()
        link = escape(f"{stage.path.name}/{REPORT_FILE}")
        cards.append(f'<a class="stage" href="{link}">{inner}</a>' if has_page else f'<div class="stage">{inner}</div>')
    return Section("Stages", f'<div class="stages">{"".join(cards)}</div>')


def stage_clusters(run: RunFolder) -> Section | None:
    """The clusters of a pipeline's stages, side by side."""
    found = [(stage.path.name, stage.path / "figures" / MONTAGE) for stage in run.stages]
    sheets = [picture(path, f"{name}: members of its clusters.") for name, path in found if path.is_file()]
    return Section("Clusters", f'<div class="grid">{"".join(sheets)}</div>') if sheets else None


#: The picture that stands for a stage: the first of these that it has.
MONTAGE = "cluster_montage.png"
MAIN_FIGURES = (MONTAGE, "test.png", "loss.png")


def curves(run: RunFolder) -> Section | None:
    """Loss, learning rate, test metrics and throughput over training (metrics.jsonl)."""
    by_kind: dict[str, list[Record]] = {}
    for record in run.metrics:
        by_kind.setdefault(str(record.get("kind", "train")), []).append(record)
    train, tests, epochs = (by_kind.get(kind, []) for kind in ("train", "test", "train_epoch"))
    x = "epoch" if all("epoch" in record for record in run.metrics) else "step"
    loss = lines_of(train, x=x, take="loss".__eq__, rename="steps")
    loss.update(lines_of(epochs + tests, x=x, take=lambda key: "loss" in key))
    terms = lines_of(train, x=x, take=lambda key: key.startswith("loss_"))
    measured = lines_of(tests + epochs, x=x, take=lambda key: "loss" not in key and key not in NOT_PLOTTED)
    if all(len(values) == 1 for _, values in measured.values()):  # one test at the end: the results say it better
        measured = {}
    folder = run.path / "figures"
    drawn = [
        _curve(
            folder / "loss.png",
            loss,
            x=x,
            y="loss",
            caption="Loss: of training steps, mean of epochs, test.",
            smooth=True,
        ),
        _curve(
            folder / "loss_terms.png",
            {key.removeprefix("loss_"): line for key, line in terms.items()},
            x=x,
            y="term of the loss",
            caption="Terms of the loss of training steps, with their weights.",
            smooth=True,
            from_zero=True,
        ),
        _curve(
            folder / "test.png",
            _main_lines(measured),
            x=x,
            y=spaced(*measured) if len(measured) == 1 else "metric",
            caption="Metrics after each epoch.",
        ),
    ]
    for key, y, caption in TRAIN_CURVES:
        line = lines_of(train, x=x, take=key.__eq__)
        drawn.append(_curve(folder / f"{key}.png", line, x=x, y=y, caption=caption, smooth=True, from_zero=True))
    pictures = "".join(drawn)
    return Section("Curves", f'<div class="grid">{pictures}</div>') if pictures else None


Record = Mapping[str, Any]

#: Charts of single values of training steps: key of the record, axis, caption.
TRAIN_CURVES = (
    ("lr", "learning rate", "Learning rate."),
    ("grad_norm", "gradient norm", "Norm of the gradient."),
    ("images_per_s", "images per second", "Throughput."),
    ("data_wait_share", "share of time", "Share of the time spent waiting for data."),
)
#: Values of epochs that say how long something took, not how good it is.
NOT_PLOTTED = ("seconds", "images_per_s", "data_wait_share", "lr")
MAX_LINES = 8


def lines_of(
    records: Sequence[Record], *, x: str, take: Callable[[str], bool], rename: str = ""
) -> dict[str, tuple[list[float], list[float]]]:
    """The numbers under every key that `take` accepts as {key or `rename`: (x values, y values)}."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for key, value in record.items():
            if key in COORDINATES or not isinstance(value, int | float) or not take(key):
                continue
            xs, ys = lines.setdefault(rename or key, ([], []))
            xs.append(record[x])
            ys.append(value)
    return lines


def _main_lines(lines: dict[str, Any]) -> dict[str, Any]:
    """At most eight curves: those of the headline metrics if there are too many."""
    if len(lines) > MAX_LINES:
        main = {key: line for key, line in lines.items() if any(part in key for part in HEADLINE_METRICS[:3])}
        lines = main or lines
    return dict(list(lines.items())[:MAX_LINES])


def _curve(
    path: Path,
    lines: dict[str, Any],
    *,
    x: str,
    y: str,
    caption: str,
    smooth: bool = False,
    from_zero: bool = False,
) -> str:
    lines = {name: line for name, line in lines.items() if any(math.isfinite(value) for value in line[1])}
    if not lines:
        return ""
    figures.curves(path, lines, xlabel=x, ylabel=y, smooth=smooth, from_zero=from_zero)
    return picture(path, caption)


def evaluation(run: RunFolder) -> Section | None:
    """kNN and probes per layer, from the flat results of the engine evaluate: linear_top1_res4 and the like."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for key, value in run.results.items():
        match = MEASUREMENT.fullmatch(key)
        if match:
            table.setdefault((match["layer"] or "", match["protocol"]), {})[match["what"]] = value
    rows = [
        [
            f"{protocol.replace('_', ' ')} {layer}".strip(),
            numbers.get("top1"),
            numbers.get("top5"),
            numbers.get("total"),
        ]
        for (layer, protocol), numbers in sorted(table.items())
        if "top1" in numbers
    ]
    columns = ("", "top-1 %", "top-5 %", "images counted")
    return Section("Evaluation", bar_table(columns, rows)) if rows else None


MEASUREMENT = re.compile(r"(?P<protocol>knn(_\d+)?|linear|low_shot_\d+)_(?P<what>top1|top5|total)(_(?P<layer>.+))?")


def clusters(run: RunFolder) -> Section | None:
    """How the clusters look: montage, sizes, projection, agreement with classes (clusters/kmeans.json, report.npz)."""
    found = run.json("clusters/kmeans.json")
    data = run.arrays("clusters/report.npz")
    if not found or not data:
        return None
    folder = run.path / "figures"
    objective = {"objective": (range(1, len(found["objective"]) + 1), found["objective"])}
    drawn = [
        picture(figures.sizes(folder / "cluster_sizes.png", data["sizes"]), "Cluster sizes."),
        _curve(folder / "kmeans.png", objective, x="iteration", y="objective", caption="k-means objective."),
        _projection(folder / "cluster_projection.png", data, of="projection_label", caption="coloured by class"),
        _projection(folder / "cluster_projection_k.png", data, of="projection_cluster", caption="coloured by cluster"),
    ]
    body = f'<div class="tiles">{_cluster_tiles(run, found)}</div>' + _montage(run, data)
    return Section("Clusters", body + f'<div class="grid">{"".join(drawn)}</div>')


def _projection(path: Path, data: Mapping[str, Any], *, of: str, caption: str) -> str:
    """The projected points with a known label; nothing if there is none."""
    is_known = data[of] >= 0
    if not is_known.any():
        return ""
    figures.projection(path, data["projection"][is_known], data[of][is_known])
    return picture(path, f"Two principal components of the features, {caption}.")


def _cluster_tiles(run: RunFolder, found: Mapping[str, Any]) -> str:
    sizes = sorted(found["sizes"])
    facts = [
        (found["num_clusters"], "clusters"),
        (f"{found['rows']:,}", "images"),
        (f"{sizes[0]} / {sizes[len(sizes) // 2]} / {sizes[-1]}", "smallest / median / largest cluster"),
        (len(found["empty"]), "empty clusters"),
        (found["backend"], "k-means backend"),
        *((f"{run.results[key]:.1f} %", f"{name} with the classes") for key, name in AGREEMENT if key in run.results),
    ]
    return "".join(f'<div class="tile"><b>{escape(str(v))}</b><span>{escape(name)}</span></div>' for v, name in facts)


AGREEMENT = (("nmi", "NMI"), ("ari", "adjusted Rand index"), ("purity", "purity"))


def _montage(run: RunFolder, data: Mapping[str, Any]) -> str:
    shown = list(dict.fromkeys(data["montage_cluster"].tolist()))
    if not shown:
        return ""
    rows = [data["montage_images"][data["montage_cluster"] == cluster] for cluster in shown]
    titles = [f"cluster {cluster}\n{data['sizes'][cluster]} images" for cluster in shown]
    path = figures.montage(run.path / "figures" / MONTAGE, rows, titles)
    return picture(path, "Members of the largest clusters and of some others, chosen at random.")


def profile(run: RunFolder) -> Section | None:
    """Where the time of a training step went (profile/profile.json)."""
    found = run.json("profile/profile.json")
    if not found:
        return None
    first, last = found["steps"]
    whole, speed = found["step_ms"], found["images_per_s"]
    said = f"<p>{whole:.2f} ms per step, {speed:.0f} images/s (steps {first} to {last}).</p>"
    rows = [[phase, 100 * ms / whole, f"{ms:.3f}"] for phase, ms in found["phases_ms"].items()]
    cells = [
        f'<td class="k">{escape(one["name"])}</td><td>{one["calls"]:.1f}</td><td>{one["ms"]:.3f}</td>'
        for one in found["operations"]
    ]
    table = folded_table(("operation", "calls per step", "ms per step"), cells, open_rows=0, what="the {} slowest")
    advice = "".join(f'<p class="open">{escape(line)}</p>' for line in found["advice"])
    return Section("Profile", said + advice + bar_table(("phase", "% of a step", "ms"), rows) + table)


def weights(run: RunFolder) -> Section | None:
    """Where the initial weights came from, and what became of each tensor (weights_report.json)."""
    report = run.json("weights_report.json")
    if not isinstance(report, dict):
        return None
    notes = "".join(f'<p class="muted">{escape(str(note))}</p>' for note in report.get("notes", []))
    if not report.get("source"):
        return Section("Weights", "<p>Randomly initialised; no weights file was given.</p>" + notes)
    tiles = [
        f'<div class="tile"><b>{100 * part["share"]:.1f} %</b><span>of {part["total"]:,} {name} parameters</span></div>'
        for name, part in ((name, report.get(name)) for name in ("trunk", "heads"))
        if part and part["total"]
    ]
    tiles += [
        f'<div class="tile"><b>{count}</b><span>{escape(status)} tensors</span></div>'
        for status, count in report.get("counts", {}).items()
        if count
    ]
    tensors = [
        f'<td>{escape(row["status"])}</td><td class="k">{escape(row["model"])}</td><td class="k">{escape(row["file"])}</td>'
        f'<td class="k">{_shape(row["model_shape"])}</td><td class="k">{_shape(row["file_shape"])}</td>'
        for row in report.get("tensors", [])
    ]
    columns = ("", "in the model", "in the file", "shape", "shape in the file")
    where = f"<p>From <code>{escape(str(report['source']))}</code></p>"
    table = folded_table(columns, tensors, open_rows=0, what="all {} tensors")
    return Section("Weights", where + f'<div class="tiles">{"".join(tiles)}</div>' + notes + table)


def _shape(shape: Sequence[int] | None) -> str:
    return "–" if shape is None else " × ".join(map(str, shape)) or "scalar"


def configuration(run: RunFolder) -> Section | None:
    """What the command line changed, and every value that is not the schema's default."""
    from vissl_like.config.schema import defaults

    if not run.job:
        return None
    given = [f'<td class="k">{escape(key)}</td><td class="k">{as_text(v)}</td>' for key, v in run.changes.items()]
    body = (
        "<h3>Changed from the recipe</h3>" + folded_table(("option", "value"), given, open_rows=OPEN_ROWS)
        if given
        else '<p class="muted">The recipe as it stands; nothing was changed.</p>'
    )
    base = flatten(defaults())
    changed = [
        f'<td class="k">{escape(key)}</td><td class="k">{as_text(value)}</td>'
        f'<td class="k muted">{as_text(base.get(key))}</td>'
        for key, value in flatten(run.job).items()
        if value != base.get(key)
    ]
    body += f"<h3>Different from the defaults ({len(changed)})</h3>"
    body += folded_table(("option", "value", "default"), changed, open_rows=0, what="show {}")
    return Section("Configuration", body)


def inferred(run: RunFolder) -> Section | None:
    """Values that were worked out, with their reasons (plan.json)."""
    plan = run.json("plan.json")
    if not isinstance(plan, dict) or not (plan.get("rows") or plan.get("warnings")):
        return None
    cells = [
        f'<td class="k">{escape(str(row["key"]))}</td><td class="k">{as_text(row["given"])}</td>'
        f'<td class="k">{as_text(row["used"])}</td><td>{escape(str(row["reason"]))}</td>'
        for row in plan.get("rows", [])
    ]
    warnings = "".join(f'<p class="open">{escape(str(warning))}</p>' for warning in plan.get("warnings", []))
    table = folded_table(("option", "given", "used", "why"), cells, open_rows=len(cells))
    return Section("Inferred values", warnings + table)


def bad_images(run: RunFolder) -> Section | None:
    """Images that could not be read and were replaced (bad_images.txt)."""
    file = run.path / "bad_images.txt"
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()] if file.is_file() else []
    if not lines:
        return None
    rows = [f'<td class="k">{escape(line)}</td>' for line in lines]
    text = f"<p>{len(lines)} could not be read; each was replaced by another image of the data set.</p>"
    return Section("Bad images", text + folded_table((), rows, open_rows=OPEN_ROWS))


def environment(run: RunFolder) -> Section | None:
    """Versions and machine (environment.json)."""
    values = run.json("environment.json")
    if not values:
        return None
    rows = [
        f'<td class="k">{escape(key)}</td><td class="k">{as_text(value)}</td>' for key, value in flatten(values).items()
    ]
    return Section("Environment", folded_table((), rows, open_rows=0, what="show {} entries"))


#: The page, top to bottom.
SECTIONS: tuple[Callable[[RunFolder], Section | None], ...] = (
    summary_table,
    stages,
    stage_clusters,
    parts,
    evaluation,
    clusters,
    results,
    curves,
    profile,
    weights,
    configuration,
    inferred,
    bad_images,
    environment,
)
