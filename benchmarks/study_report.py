"""Tables and pictures of the study, from its rows."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks import harness

Row = dict[str, Any]
AXES = {"seconds": "processor time, seconds", "macs": "multiply-adds"}
NEAR = 0.95  # share of the best speed-up that counts as the right choice
# Okabe and Ito's colours, which remain distinct under the usual colour deficiencies.
STYLES = {
    "all weights": {"color": "black", "marker": "o", "ls": "-"},
    "embeddings frozen": {"color": "#999999", "marker": ".", "ls": ":"},
    "GradES": {"color": "#D55E00", "marker": "s", "ls": "-"},
    "signal, auto": {"color": "#F0E442", "marker": "P", "ls": "-"},
    "authors' rule": {"color": "#56B4E9", "marker": "v", "ls": "-"},
    "early stopping": {"color": "#CC79A7", "marker": "X", "ls": ""},
    "chosen cut": {"color": "#0072B2", "marker": "o", "ls": "-"},
    "chosen cut + GradES": {"color": "#009E73", "marker": "D", "ls": "-"},
    "best cut with hindsight": {"color": "#E69F00", "marker": "^", "ls": "--"},
}


def read(name: str) -> list[Row]:
    """Rows of results/<name>.csv, numbers as numbers; none where there is no file."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    path = harness.RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def grouped(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]].append(row)
    return dict(groups)


def standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


class Curve:
    """Loss of "all weights" against its cost, on straight lines over the logarithm of the cost.

    Beyond its ends the nearest line goes on.
    """

    def __init__(self, rows: Iterable[Row], axis: str) -> None:
        self.points = sorted((math.log(row[axis]), row["loss"]) for row in rows)
        self.falling = self.points[:1]  # without the runs that reached no lower loss for more
        for point in self.points[1:]:
            if point[1] < self.falling[-1][1]:
                self.falling.append(point)

    def loss(self, cost: float) -> float:
        """Loss at `cost`."""
        return _on_line(self.points, math.log(cost))

    def cost(self, loss: float) -> float:
        """Cost that reaches `loss`."""
        return math.exp(_on_line([(y, x) for x, y in reversed(self.falling)], loss))


def _on_line(points: Sequence[tuple[float, float]], at: float) -> float:
    if len(points) == 1:
        return points[0][1]
    k = next((k for k, (x, _) in enumerate(points[1:-1], 1) if x >= at), len(points) - 1)
    (x0, y0), (x1, y1) = points[k - 1 : k + 1]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


class Results:
    """The runs of one study, with those of the chosen cut and of the best cut among them."""

    def __init__(self, name: str) -> None:
        self.all_probes = read(f"{name}-probe")
        self.probes = [row for row in self.all_probes if row["variant"] == "choose_cut"]
        largest = {
            task: max(row["batch_share"] for row in rows)
            for task, rows in grouped(self.probes, "task").items()
        }
        self.probes = [r for r in self.probes if r["batch_share"] == largest[r["task"]]]
        self.choice = {(r["task"], r["seed"]): r for r in self.probes if r["chosen"]}
        keys = ("task", "arm", "budget", "seed")
        runs = {  # of a run that was repeated with a better learning rate the last row
            tuple(row[key] for key in keys): row
            for row in read(f"{name}-runs")
            if row["stage"] == "run" and (row["task"], row["seed"]) in self.choice
        }
        self.runs = list(runs.values())
        self.full = grouped((r for r in self.runs if r["arm"] == "all weights"), "task", "seed")
        self.runs += [*self._chosen(), *self._best()]

    def _chosen(self) -> list[Row]:
        """Runs of the cut that the probe of the seed chose, with the cost of the probe."""
        rows = []
        for row in self.runs:
            probe = self.choice[row["task"], row["seed"]]
            arm = cut_name(probe["cut"])
            for suffix in ("", " + GradES"):
                if row["arm"] == arm + suffix:
                    costs = {axis: row[axis] + probe[axis] for axis in AXES}
                    rows.append({**row, **costs, "arm": "chosen cut" + suffix})
        return rows

    def _best(self) -> list[Row]:
        """Runs of the fixed cut with the smallest mean loss at a budget."""
        rows = []
        for members in grouped(filter(is_fixed, self.runs), "task", "budget").values():
            arms = grouped(members, "arm")
            most = max(map(len, arms.values()))
            means = {a: fmean(r["loss"] for r in x) for a, x in arms.items() if len(x) == most}
            best = min(means, key=means.__getitem__)
            if len(arms) == 1:  # no cut was run at this budget
                continue
            rows += [{**r, "arm": "best cut with hindsight", "cut": best} for r in arms[best]]
        return rows

    def speed_up(self, row: Row, axis: str) -> float:
        """Cost at which "all weights" of the same seed has the loss of `row`, over its cost."""
        curve = Curve(self.full[row["task"], row["seed"]], axis)
        return curve.cost(row["loss"]) / row[axis]

    def is_beyond(self, row: Row) -> bool:
        """Whether no run of "all weights" reached the loss."""
        return row["loss"] < min(r["loss"] for r in self.full[row["task"], row["seed"]])

    def difference(self, row: Row, axis: str) -> float:
        """Loss of `row` less that of "all weights" of the same seed at the same cost."""
        curve = Curve(self.full[row["task"], row["seed"]], axis)
        return row["loss"] - curve.loss(row[axis])

    def table(self) -> list[Row]:
        """Means over the seeds for each task, budget and arm, with the range of speed-ups."""
        lines = []
        for (task, budget, arm), rows in grouped(self.runs, "task", "budget", "arm").items():
            if arm.startswith("cut ") and arm not in ("cut 0",):
                continue
            beyond = "~" if any(map(self.is_beyond, rows)) and arm != "all weights" else ""
            line = {"task": task, "budget": budget, "arm": arm, "seeds": len(rows)}
            line["cut"] = self._cuts(rows)
            line["loss"] = f"{fmean(r['loss'] for r in rows):.3f}"
            for axis in AXES:
                differences = [self.difference(r, axis) for r in rows]
                ratios = [math.log(self.speed_up(r, axis)) for r in rows]
                line[f"difference, {axis}"] = (
                    f"{fmean(differences):+.3f} ({standard_error(differences):.3f})"
                )
                mean, low, high = map(math.exp, (fmean(ratios), min(ratios), max(ratios)))
                line[f"speed-up, {axis}"] = f"{beyond}{mean:.2f} ({low:.1f}-{high:.1f})"
            line["frozen"] = f"{fmean(r['frozen'] for r in rows):.2f}"
            line["probe"] = ""
            if arm.startswith("chosen"):
                shares = [self.choice[task, r["seed"]]["seconds"] / r["seconds"] for r in rows]
                line["probe"] = f"{fmean(shares):.1%}"
            lines.append(line)
        return sorted(lines, key=lambda line: (line["task"], line["budget"]))

    def _cuts(self, rows: Sequence[Row]) -> str:
        cuts = {
            str(self.choice[r["task"], r["seed"]]["cut"]).removesuffix(".0")
            if r["arm"].startswith("chosen")
            else r.get("cut", r["arm"]).removeprefix("cut ")
            for r in rows
        }
        return "/".join(sorted(cuts))

    def predictions(self, axis: str) -> list[Row]:
        """G/c of the probe, measured speed-up of each cut, means over the seeds."""
        predicted = {
            key: fmean(row["ratio"] for row in rows)
            for key, rows in grouped(self.probes, "task", "cut").items()
        }
        lines = []
        for (task, budget, arm), rows in grouped(
            filter(is_fixed, self.runs), "task", "budget", "arm"
        ).items():
            cut = "none" if arm == "all weights" else float(arm.removeprefix("cut "))
            if (task, cut) not in predicted:  # with LoRA nothing trains below the blocks
                continue
            speed_up = math.exp(fmean(math.log(self.speed_up(r, axis)) for r in rows))
            line = {"task": task, "budget": budget, "cut": cut, "predicted": predicted[task, cut]}
            line["measured"] = speed_up if cut != "none" else 1.0
            line["beyond"] = cut != "none" and any(map(self.is_beyond, rows))
            lines.append(line)
        return lines

    def rule(self, axis: str) -> list[Row]:
        """Rank correlation of prediction and speed-up; the loss of the choice against the best."""
        lines = []
        for (task, budget), rows in grouped(self.predictions(axis), "task", "budget").items():
            if len(rows) == 1:
                continue
            measured = {row["cut"]: row["measured"] for row in rows}
            best = max(measured, key=measured.__getitem__)
            choices = [r["cut"] for (t, _), r in self.choice.items() if t == task]
            kept = [measured[c] / measured[best] for c in choices if c in measured]
            ranks = spearman([r["predicted"] for r in rows], [r["measured"] for r in rows])
            line = {"task": task, "budget": budget, "cuts": len(rows), "rank correlation": ranks}
            line |= {"best cut": best, "speed-up of the best": measured[best]}
            line |= {"chosen": "/".join(map(str, choices)), "kept": fmean(kept or [math.nan])}
            lines.append(line | {"right": f"{sum(x >= NEAR for x in kept)} of {len(choices)}"})
        return [{k: _short(v) for k, v in line.items()} for line in lines]

    def trials(self, axis: str) -> list[Row]:
        """The choices of other probes: kept share of the best speed-up, and right choices.

        "after head steps" is the probe of the task whose head is trained first, asked for the task
        with a new head.
        """
        measured = {
            key: {row["cut"]: row["measured"] for row in rows}
            for key, rows in grouped(self.predictions(axis), "task", "budget").items()
            if len(rows) > 1
        }
        rows = [{**row, "asked": row["task"]} for row in self.all_probes]
        rows += [
            {**row, "asked": "MiniLM, new head", "variant": f"{row['variant']} after head steps"}
            for row in self.all_probes
            if row["task"] == "MiniLM, trained head"
        ]
        lines = []
        for (variant, n, share), members in grouped(
            rows, "variant", "batches", "batch_share"
        ).items():
            chosen = [row for row in members if row["chosen"]]
            kept = [
                speed_ups.get(row["cut"], math.nan) / max(speed_ups.values())
                for row in chosen
                for (task, _), speed_ups in measured.items()
                if task == row["asked"]
            ]
            known = [x for x in kept if not math.isnan(x)]
            line = {"variant": variant, "batches": n, "batch_share": share}
            line |= {"tasks": len({row["asked"] for row in members}), "kept": fmean(known or [0])}
            line["right"] = f"{sum(x >= NEAR for x in known)} of {len(known)}"
            line["not run"] = len(kept) - len(known)
            line["choices"] = " ".join(
                f"{task}: " + "/".join(_short(row["cut"]) for row in mine)
                for task, mine in grouped(chosen, "asked").items()
            )
            lines.append({k: _short(v) for k, v in line.items()})
        return lines


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def cut_name(cut: Any) -> str:
    return "all weights" if cut == "none" else f"cut {int(cut)}"


def is_fixed(row: Row) -> bool:
    return row["arm"] == "all weights" or (
        row["arm"].startswith("cut ") and "+" not in row["arm"] and row["arm"] != "cut"
    )


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of the ranks; NaN for fewer than three values."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < w for v in values) + sum(v == w for v in values) / 2 for w in values]

    a, b = ranks(x), ranks(y)
    mean_a, mean_b = fmean(a), fmean(b)
    both = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    squares = sum((p - mean_a) ** 2 for p in a) * sum((q - mean_b) ** 2 for q in b)
    return both / math.sqrt(squares) if len(x) > 2 and squares else math.nan


def noise_floors(steps: int = 300, n: int = 20_000) -> list[Row]:
    """sum|m_hat| / sum sqrt(v_hat) and Q = sum m_hat^2 / (rho sum v_hat) of noise, by density."""
    rows = []
    for beta1 in (0.8, 0.9, 0.95):
        for density in (1.0, 0.02):
            generator = torch.Generator().manual_seed(0)
            m, v = torch.zeros(2, n, dtype=torch.float64)
            values = []
            for t in range(1, steps + 1):
                g = torch.randn(n, generator=generator, dtype=torch.float64)
                g *= torch.rand(n, generator=generator) < density
                m.lerp_(g, 1 - beta1)
                v.lerp_(g * g, 0.001)
                if t > steps // 2:
                    m_hat, v_hat = m / (1 - beta1**t), v / (1 - 0.999**t)
                    rho = (1 - beta1) * (1 + beta1**t) / ((1 + beta1) * (1 - beta1**t))
                    ratio = m_hat.abs().sum() / v_hat.sqrt().sum()
                    values.append((ratio, m_hat.square().sum() / (rho * v_hat.sum())))
            means = [round(float(sum(x) / len(values)), 3) for x in zip(*values, strict=True)]
            rows.append({"beta1": beta1, "density": density, "ratio": means[0], "Q": means[1]})
    return rows


# Pictures


def _panels(tasks: Sequence[str], draw: Callable[[Any, str], None], path: Any, note: str) -> None:
    """One panel for each task, a common legend below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.4 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, task in zip(axes.flat, tasks, strict=False):
        draw(axis, task)
        axis.set_title(task, loc="left", fontweight="bold")
        axis.grid(alpha=0.2)
        handles |= {x.get_label(): x for x in axis.get_legend_handles_labels()[0]}
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, title=note
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_compute(results: Results, axis: str, path: Any) -> None:
    """Loss against compute by task; bars are one standard error over the seeds."""

    def draw(panel: Any, task: str) -> None:
        arms = grouped((r for r in results.runs if r["task"] == task), "arm")
        arms["embeddings frozen"] = arms.get("cut 0", [])
        for name, style in STYLES.items():
            points = sorted(
                (
                    fmean(r[axis] for r in rows),
                    fmean(r["loss"] for r in rows),
                    standard_error([r["loss"] for r in rows]),
                )
                for rows in grouped(arms.get(name, []), "budget").values()
            )
            if points:
                x, y, error = zip(*points, strict=True)
                panel.errorbar(x, y, error, label=name, capsize=2, ms=6, **style)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if axis == "seconds" else f"{x:.1e}")
        panel.set_xlabel(AXES[axis])
        panel.set_ylabel("validation loss, nats")

    _panels(list(grouped(results.runs, "task")), draw, path, "")


def draw_rule(results: Results, axis: str, path: Any) -> None:
    """Measured speed-up against G/c, a point for each cut, by task and budget."""

    def draw(panel: Any, task: str) -> None:
        rows = [row for row in results.predictions(axis) if row["task"] == task]
        for (budget, members), colour in zip(
            sorted(grouped(rows, "budget").items()), ("#0072B2", "#E69F00", "#009E73"), strict=False
        ):
            members = sorted(members, key=lambda r: -1 if r["cut"] == "none" else r["cut"])
            x, y = [r["predicted"] for r in members], [r["measured"] for r in members]
            panel.plot(x, y, "o", color=colour, label=f"budget {budget:g}x")
            for row, at, height in zip(members, x, y, strict=True):
                cut = row["cut"] if row["cut"] == "none" else f"{row['cut']:g}"
                if row["beyond"]:
                    panel.plot(at, height, "o", color=colour, mfc="white")
                panel.annotate(
                    cut, (at, height), fontsize=8, xytext=(3, 3), textcoords="offset points"
                )
        panel.axhline(1, color="black", lw=0.5)
        panel.axvline(1, color="black", lw=0.5)
        panel.set_xlabel("predicted: G/c")
        panel.set_ylabel("measured speed-up")

    _panels(
        list(grouped(results.runs, "task")),
        draw,
        path,
        "numbers: cut; hollow: beyond the longest run of all weights",
    )


def report(name: str) -> None:
    """Print the tables and write the pictures of results/<name>-*.csv."""
    results = Results(name)
    harness.print_table("means over the seeds", results.table())
    for axis in AXES:
        harness.print_table(f"the rule, by {AXES[axis]}", results.rule(axis))
    harness.print_table("other probes", results.trials("seconds"))
    harness.print_table("noise floors", noise_floors())
    draw_compute(results, "seconds", harness.RESULTS / f"{name}-compute.png")
    draw_compute(results, "macs", harness.RESULTS / f"{name}-macs.png")
    draw_rule(results, "seconds", harness.RESULTS / f"{name}-rule.png")
