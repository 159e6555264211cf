"""python -m kd_jax.report DIR [DIR ...] [--out=FILE.html]"""

import argparse
import sys

from kd_jax import report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kd_jax.report",
        description="Makes the page of a run, an evaluation or an ablation again, or puts several on one.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="where a run, an evaluation or an ablation is")
    parser.add_argument("--out", default="", help="the page; by default report.html in the one folder")
    args = parser.parse_args()
    try:
        print(f"wrote {report.write(args.folders, args.out)}")
    except (ValueError, OSError) as error:
        sys.exit(f"kd_jax.report: {error}")


if __name__ == "__main__":
    main()
