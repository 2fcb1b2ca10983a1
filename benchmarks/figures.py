"""Draws an experiment's rows: its tables in Markdown on the terminal, its figures as files for the documentation.

python benchmarks/figures.py analyses_small defenses_gtsrb
"""

import argparse
from pathlib import Path

import measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="experiments' folders under --results")
    parser.add_argument("--results", type=Path, default=measuring.RESULTS, help="where they are")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder for NAME-FIGURE.png")
    measuring.command(parser, run)


def run(arguments: argparse.Namespace) -> None:
    from backdoor_jax.analyses import ANALYSES
    from backdoor_jax.drawing import save_figure
    from backdoor_jax.errors import UserError
    from backdoor_jax.experiment import read_rows
    from backdoor_jax.report.figures import scatter
    from backdoor_jax.report.table import compact, markdown

    experiments = {name: read_rows(arguments.results / name / "results.jsonl") for name in arguments.names}
    for name, rows in experiments.items():
        if not rows:
            raise UserError(f"{arguments.results / name}: no results.jsonl with rows; run configs/{name}.yaml first")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in experiments.items():
        print(f"{name}\n\n{markdown(rows)}\n\nACC / ASR:\n\n{compact(rows)}\n")
        figures = {"scatter": scatter(rows), **{key: analysis.draw(rows) for key, analysis in ANALYSES.items()}}
        for key, figure in figures.items():
            if figure is not None:
                file = arguments.out / f"{name}-{key}.png"
                save_figure(figure, file)
                print(file)


if __name__ == "__main__":
    main()
