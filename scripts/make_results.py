"""Writes docs/results.md and the README's results from the files in docs/data, and adds the results of finished sweeps to
docs/data.

    python scripts/make_results.py
    python scripts/make_results.py collect [--commits] NAME "COMMAND" DIR...

`collect` writes a report on the runs in DIR and keeps its tables as docs/data/NAME/report.csv, runs.csv, layers.csv and
published.csv. It also writes about.yaml, which names the command, the commit, the versions and the machine. If DIR is the folder
`tuned` of a tuning study, `collect` also keeps the study's tables of rules and trials (tune.csv and trials.csv). Runs of code
with uncommitted changes are refused, and so are runs of several commits unless `--commits` is given. The prose is in the
templates, docs/data/*.jinja. Every number in a table, and every number that the prose takes from a run, comes from the files in
docs/data. A test compares the committed page with the output.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml

from fa_bench.report.columns import COLUMNS as REPORT_COLUMNS

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "data"
TEMPLATE = "results.md.jinja"
PAGE = ROOT / "docs" / "results.md"
README, README_TEMPLATE = ROOT / "README.md", "readme.md.jinja"
#: The lines of the README before and after the results.
START, END = "<!-- results -->\n", "<!-- end of results -->"
#: Tables of a report -> their names in docs/data/NAME.
KEPT = {
    "report.csv": "report.csv",
    "runs.csv": "runs.csv",
    "report_layers.csv": "layers.csv",
    "report_published.csv": "published.csv",
}
#: Columns that are not kept, because they contain the location of a run on the machine or may mention it in an error.
_LOCAL = ("directory", "reason")
#: The tables of a tuning study that are kept.
TUNED = ("tune.csv", "trials.csv")
_COMPARED = ["label", "quantity", "ours", "ours_std", "published", "difference", "source"]


class Study:
    """The committed results of one sweep.

    Attributes:
        name: the name of the folder in docs/data.
        about: the content of about.yaml.
        report: one row per rule and setting, indexed by its label.
        runs: one row per run.
        layers: one row per label, layer and quantity: mean and standard deviation over seeds.
        published: one row per published number that the runs are compared with.
        tuned: one row per rule, if the runs are the final ones of a tuning study.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.about: dict[str, Any] = yaml.safe_load((folder / "about.yaml").read_text(encoding="utf-8"))
        report = pd.read_csv(folder / "report.csv").set_index("label", drop=False)
        # Columns that are blank in every row are not stored, so they are added here.
        self.report = report.reindex(columns=list(dict.fromkeys([*report.columns, *REPORT_COLUMNS])))
        self.runs = pd.read_csv(folder / "runs.csv")
        self.layers, self.published, self.tuned = (
            pd.read_csv(path) if path.exists() else pd.DataFrame()
            for path in (folder / "layers.csv", folder / "published.csv", folder / "tune.csv")
        )

    @classmethod
    def named(cls, name: str) -> Study:
        """The study in docs/data/`name`."""
        return cls(name, DATA / name)

    def tuned_scores(self) -> dict[str, str]:
        """The accuracy and confidence interval of each rule of a tuning study, as text, with the most accurate rule first."""
        ordered = self.tuned.sort_values("test_accuracy", ascending=False, kind="stable")
        return {str(row["rule"]): _interval(row) for _, row in ordered.iterrows()}

    def header(self) -> str:
        """The command, followed by a sentence that names the commit, versions, machine and seeds."""
        about = self.about
        seeds = sorted(self.runs["seed"].unique())
        listed = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
        threads = "" if (n := about.get("threads")) is None else "one thread per run, " if n == 1 else f"{n} threads per run, "
        command = "\n".join(f"    {line}" for line in about["command"].splitlines())
        return (
            f"{command}\n\nThe runs are from {_commits(about['commit'])} (torch {about['torch']}, Python {about['python']}, "
            f"{about['processor']}, {threads}{listed})."
        )

    def value(self, label: str, column: str, digits: int = 2) -> str:
        """A number from the report, as text."""
        return f"{self.report.at[label, column]:.{digits}f}"

    def run(self, label: str, seed: int, column: str, form: str = ".2f") -> str:
        """A number from a single run, as text."""
        return format(self.runs.set_index(["label", "seed"]).at[(label, seed), column], form)

    def angles(self, label: str, quantity: str, digits: int = 1, std: bool = True, layer: str | None = None) -> str:
        """The mean of a quantity in one layer, or in each layer in the order of the report, as text.

        The standard deviation follows the mean if there are several seeds and `std` is true.
        """
        chosen = self.layers["layer"].notna() if layer is None else self.layers["layer"] == layer
        rows = self.layers[(self.layers["label"] == label) & (self.layers["quantity"] == quantity) & chosen]
        return ", ".join(
            f"{row.mean:.{digits}f}" + (f" ± {row.std:.{digits}f}" if std and row.n > 1 else "")
            for row in rows.itertuples(index=False)
        )

    def comparison(self, digits: int = 2) -> str:
        """A Markdown table that compares the published numbers with those of the runs."""
        rows = [
            [
                str(row["label"]),
                str(row["quantity"]).replace("_", " "),
                f"{row['ours']:.{digits}f}" + ("" if _is_blank(row["ours_std"]) else f" ± {row['ours_std']:.{digits}f}"),
                f"{row['published']:.{digits}f}",
                f"{row['difference']:+.{digits}f}",
                str(row["source"]),
            ]
            for row in self.published.reindex(columns=_COMPARED).to_dict("records")
        ]
        return _markdown(["rule", "quantity", "ours", "published", "difference", "published in"], rows)

    def by_setting(self, key: str, column: str = "val_accuracy", digits: int = 2) -> str:
        """A Markdown table of single runs, with a row for each rule and a column for each value of a swept key.

        The highest number of each rule is in bold. If a run has not finished, the cell has its status instead of a number. A cell
        without a run is "-".

        Raises:
            ValueError: if a rule has several runs with the same value of the key.
        """
        values = sorted(self.runs[key].unique())
        rows = []
        for rule in dict.fromkeys(self.runs["algorithm"]):
            runs = self.runs[self.runs["algorithm"] == rule].set_index(key)
            if not runs.index.is_unique:
                raise ValueError(f"{self.name}: {rule} has several runs with the same value of {key}")
            finished = runs[runs["status"] == "finished"][column]
            texts = {value: str(runs.at[value, "status"]) if value in runs.index else "-" for value in values}
            texts |= {value: f"{score:.{digits}f}" for value, score in finished.items()}
            texts |= {value: f"**{texts[value]}**" for value in finished.index[finished == finished.max()]}
            rows.append([rule, *texts.values()])
        return _markdown(["rule", *(f"{value:g}" for value in values)], rows)

    def tuned_table(self) -> str:
        """A Markdown table of a tuning study, with the most accurate rule first.

        The chosen values are rounded to three significant digits.
        """
        frame = self.tuned.sort_values("test_accuracy", ascending=False, na_position="last", kind="stable")
        rows = [[text(row) for text in TUNED_COLUMNS.values()] for _, row in frame.iterrows()]
        return _markdown(list(TUNED_COLUMNS), rows)

    def table(self, *columns: str, labels: list[str] | None = None, sort: str | None = None) -> str:
        """A Markdown table with some columns of the report.

        Args:
            *columns: names in `COLUMNS`, or columns of report.csv.
            labels: the rows, in this order. Default: all.
            sort: a column of report.csv, highest first; rows without a number come last.
        """
        frame = self.report if labels is None else self.report.loc[labels]
        if sort is not None:
            frame = frame.sort_values(sort, ascending=False, na_position="last", kind="stable")
        cells = [[_cell(row, column) for column in columns] for _, row in frame.iterrows()]
        return _markdown(columns, cells)


def _commits(commits: str) -> str:
    short = [commit[:7] for commit in commits.split()]
    return f"commit {short[0]}" if len(short) == 1 else f"commits {' and '.join(short)}"


def _is_blank(value: Any) -> bool:
    return bool(pd.isna(value))


def _score(row: pd.Series, digits: int = 2) -> str:
    if _is_blank(row["test_accuracy"]):
        return "-"
    text = f"{row['test_accuracy']:.{digits}f}"
    text += "" if _is_blank(row["test_accuracy_std"]) else f" ± {row['test_accuracy_std']:.{digits}f}"
    return f"**{text}**" if row["floor"] is False or row["floor"] == "False" else text


def _floor(row: pd.Series) -> str:
    if row.get("algorithm", row.get("rule")) == "frozen":
        return "floor"
    if _is_blank(row["floor"]):
        return "-"
    return "yes" if str(row["floor"]) == "True" else "**no**"


def _unfinished(row: pd.Series) -> str:
    return f"{row['runs'] - row['n']} of {row['runs']}" if row["runs"] > row["n"] else "-"


def _number(column: str, digits: int = 2, sign: str = "") -> Any:
    return lambda row: "-" if _is_blank(row[column]) else f"{row[column]:{sign}.{digits}f}"


#: Column heading -> a function that returns the cell's text for a row of report.csv.
COLUMNS: dict[str, Any] = {
    "rule": lambda row: row["label"],
    "test accuracy (%)": _score,
    "95 %": _number("test_accuracy_ci95"),
    "validation accuracy (%)": _number("val_accuracy"),
    "difference from bp": _number("bp_difference", sign="+"),
    "95 % of the difference": _number("bp_difference_ci95"),
    "beats the floor": _floor,
    "not finished": _unfinished,
    "seeds": lambda row: str(row["n"]),
    "learning rate": lambda row: "-" if _is_blank(row["optimizer.lr"]) else f"{row['optimizer.lr']:g}",
    "published": lambda row: "-" if _is_blank(row["published"]) else f"{row['published']:.2f}",
    "difference": _number("published_difference", sign="+"),
    "delta angle (°)": _number("delta_angle", 1),
    "weight angle (°)": _number("weight_angle", 1),
    "seconds per epoch": _number("seconds_per_epoch", 1),
}


def _interval(row: pd.Series) -> str:
    """The accuracy and its confidence interval, in bold if the rule does not beat the floor; "did not train" without accuracy."""
    if _is_blank(row["n"]) or row["n"] < 1 or _is_blank(row["test_accuracy"]):
        return "did not train"
    interval = "" if _is_blank(row["test_accuracy_ci95"]) else f" ± {row['test_accuracy_ci95']:.2f}"
    text = f"{row['test_accuracy']:.2f}{interval}"
    return f"**{text}**" if _floor(row) == "**no**" else text


def _chosen(row: pd.Series) -> str:
    """The chosen values, with numbers rounded to three significant digits."""
    if _is_blank(row["chosen"]):
        return "-"
    pairs = (text.partition("=")[::2] for text in str(row["chosen"]).split())
    return " ".join(f"`{key.removeprefix('optimizer.').removeprefix('algorithm.')}={_short(value)}`" for key, value in pairs)


def _short(value: str) -> str:
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value


#: Column heading -> a function that returns the cell's text for a row of tune.csv.
TUNED_COLUMNS: dict[str, Any] = {
    "rule": lambda row: row["rule"],
    "test accuracy (%), 95 %": _interval,
    "difference from bp": _number("bp_difference", sign="+"),
    "95 % of the difference": _number("bp_difference_ci95"),
    "trials that diverged": lambda row: f"{row['diverged']} of {row['trials']}",
    "chosen": _chosen,
}


def compared(studies: Mapping[str, str], common: bool = False) -> str:
    """A Markdown table of several tuning studies, with a row for each rule.

    The rules are ordered by their accuracy in the first study; rules that only the other studies have come last.

    Args:
        studies: {heading: name of the study}.
        common: whether to show only the rules that all studies have.
    """
    columns = {heading: Study.named(name).tuned_scores() for heading, name in studies.items()}
    rules = dict.fromkeys(rule for column in columns.values() for rule in column)
    shown = [rule for rule in rules if not common or all(rule in column for column in columns.values())]
    return _markdown(["rule", *columns], [[rule, *(column.get(rule, "") for column in columns.values())] for rule in shown])


def _cell(row: pd.Series, column: str) -> str:
    if column in COLUMNS:
        return COLUMNS[column](row)
    value = row[column]
    return "-" if _is_blank(value) else f"{value:g}" if isinstance(value, float) else str(value)


def archived(name: str, columns: Sequence[str] = ()) -> str:
    """The table in docs/data/archived/NAME.csv as Markdown, with unchanged cells.

    These tables were published before results were kept as files.

    Args:
        name: the name of the file, without its extension.
        columns: the names of the columns to show (if several columns have the same name, the first one); empty for all.
    """
    with (DATA / "archived" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    indices = [head.index(column) for column in columns] or range(len(head))
    return _markdown([head[index] for index in indices], [[row[index] for index in indices] for row in rows])


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def render(template: str = TEMPLATE) -> str:
    """The text of docs/results.md, or of another template in docs/data.

    Raises:
        jinja2.UndefinedError: if the template uses an undefined name.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DATA), undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(template).render(study=Study.named, archived=archived, compared=compared)


def render_readme() -> str:
    """The text of README.md, with the results between the marks replaced by the rendered template."""
    before, rest = README.read_text(encoding="utf-8").split(START)
    return f"{before}{START}{render(README_TEMPLATE)}{END}{rest.split(END)[1]}"


def collect(name: str, command: str, folders: list[Path], commits: bool = False) -> Path:
    """Write the tables of a report on the runs in `folders` to docs/data/NAME, and return this folder.

    Args:
        name: the name of the study.
        command: the command that produced the runs, as shown above the table.
        folders: the folders of runs or sweeps.
        commits: accept runs of several commits, which are all named above the table. Before using this option, check that the
            commits produce comparable results.

    Raises:
        SystemExit: if there are no runs; if their versions of torch or Python or their devices differ; if they are of several
            commits, unless `commits` is true; or if the code had uncommitted changes.
    """
    results = [json.loads(path.read_text(encoding="utf-8")) for folder in folders for path in folder.rglob("seed*/result.json")]
    if not results:
        raise SystemExit(f"no results in {', '.join(map(str, folders))}")
    hashes = {result["git"]["commit"] for result in results}
    about = {
        "command": command,
        "commit": " ".join(sorted(hashes)) if commits else _one("commit", hashes),
        "torch": _one("version of torch", {result["versions"]["torch"] for result in results}),
        "python": _one("version of Python", {result["versions"]["python"] for result in results}),
        **_machine(_one("device", {result["device"] for result in results})),
    }
    if any(result["git"]["dirty"] for result in results):
        raise SystemExit("some runs used code with uncommitted changes")
    target = DATA / name
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "fa_bench.report.cli", *map(str, folders), "--out", scratch], check=False)
        target.mkdir(parents=True, exist_ok=True)
        for source, kept in KEPT.items():
            _keep(Path(scratch) / source, target / kept)
    for path in (folder.parent / table for folder in folders for table in TUNED):
        _keep(path, target / path.name)
    (target / "about.yaml").write_text(yaml.safe_dump(about, sort_keys=False, width=200), encoding="utf-8")
    return target


def _keep(source: Path, target: Path) -> None:
    """Copy a table if it exists, without blank columns and without columns about the local machine."""
    if source.exists():
        frame = pd.read_csv(source, dtype=str, keep_default_na=False)
        columns = [column for column in frame.columns if column not in _LOCAL and frame[column].ne("").any()]
        frame[columns].to_csv(target, index=False, lineterminator="\n")


def _one(what: str, values: set[Any]) -> Any:
    if len(values) != 1:
        raise SystemExit(f"the runs have more than one {what}: {', '.join(sorted(map(str, values)))}")
    return values.pop()


def _machine(device: str) -> dict[str, Any]:
    """The entries of about.yaml for a run's `device`: the model of a GPU, or the model of a CPU and the number of threads."""
    kind, name = device.removesuffix(")").split(" (", maxsplit=1)
    return {"processor": name} if kind == "cuda" else {"processor": _processor(), "threads": int(name.split(", ")[1].split()[0])}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = {line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")}
        if names:
            return sorted(names)[0]
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="action")
    adding = commands.add_parser("collect", help="keep the tables of finished runs in docs/data")
    adding.add_argument("--commits", action="store_true", help="accept runs of several commits")
    adding.add_argument("name")
    adding.add_argument("command")
    adding.add_argument("folders", metavar="DIR", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "collect":
        print(collect(arguments.name, arguments.command, arguments.folders, arguments.commits))
    else:
        PAGE.write_text(render(), encoding="utf-8")
        README.write_text(render_readme(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
