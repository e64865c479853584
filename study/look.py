"""Where joint training helps: what it adds if questions see the image as it is after layer n.

    python study/look.py study/results/look         table and chart of what table.py has trained

Understanding updates image tokens in the first n of twelve layers only (plans `look-N` of table.py:
0 is HiMix, 1 freeze, 12 dense), alone and jointly with dense generation.
"""
from pathlib import Path

from table import (HELD_OUT, LOOK, QUESTIONS, RESULTS, cell, differences_of, markdown, mean_std,
                   read_runs, value)
from common import fail, line_chart, run_script, save_picture, script_parser

import numpy as np


def main():
    parser = script_parser(__doc__, device=False)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found, rows, lines = read_runs(folder), [], {"joint": [], "understanding only": []}
    for n in LOOK:
        names = f"joint-look-{n}", f"u-look-{n}"
        runs = [found.get(name, {}) for name in names]
        adds = differences_of(found, HELD_OUT, *names)
        if not adds:
            continue
        flops = value(next(iter(runs[0].values())), ("cost", "flops_ratio"))
        rows.append([n, f"{flops:.2f}", len(adds), mean_std(adds, 1, "+"),
                     *(cell(of_row, HELD_OUT, 100, 1) for of_row in runs),
                     *(cell(of_row, QUESTIONS, 100, 1) for of_row in runs)])
        for line, of_row in zip(lines.values(), runs):
            line.append((flops, np.mean([value(run, HELD_OUT) for run in of_row.values()])))
    if len(rows) < 2:
        fail(f"{folder}: expected runs of table.py's rows joint-look-N and u-look-N")
    grid = np.linspace(lines["joint"][0][0], lines["joint"][-1][0], 200)
    chart = line_chart({name: np.interp(grid, *zip(*line)) for name, line in lines.items()},
                       f"held-out pairs right, by FLOPs of joint training: {grid[0]:.2f} (image "
                       f"tokens updated in {rows[0][0]} layers) to {grid[-1]:.2f} ({rows[-1][0]})",
                       0, 1, (700, 400))
    save_picture(chart, RESULTS / "look.png")
    titles = ["updated in layers", "FLOPs", "seeds", "joint adds, points",
              "joint: held-out pairs, %", "alone", "joint: questions, %", "alone"]
    print(f"{markdown(titles, rows)}\n\n{RESULTS / 'look.png'}")


if __name__ == "__main__":
    run_script(main)
