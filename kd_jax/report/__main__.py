"""python -m kd_jax.report DIR [DIR ...] [--out=FILE.html]"""

import argparse
import contextlib

from kd_jax import command, report, storage
from kd_jax.storage import remote


def main() -> None:
    command.start()
    parser = argparse.ArgumentParser(
        prog="python -m kd_jax.report",
        description="Makes the page of a run, an evaluation or an ablation again, or puts several on one.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="where a run, an evaluation or an ablation is")
    parser.add_argument("--out", default="", help="the page; by default report.html in the one folder")
    args = parser.parse_args()
    with command.ends_well("kd_jax.report", lambda: "the runs are as they were"), contextlib.ExitStack() as stack:
        stack.enter_context(storage.room(args.out or args.folders[0]))
        copies = (
            remote.work_directory(folder, writes=not args.out, unread=remote.HEAVY, alone=False)
            for folder in args.folders
        )
        print(f"wrote {report.write([stack.enter_context(copy)[0] for copy in copies], args.out)}")


if __name__ == "__main__":
    main()
