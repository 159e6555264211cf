"""python -m kd_jax.report DIR [DIR ...] [--out=FILE.html]"""

import contextlib
import sys

from absl import flags

from kd_jax import command, report, storage
from kd_jax.storage import remote

FLAGS = flags.FlagValues()  # flags of this command only, because other commands have flags of the same names
flags.DEFINE_string(
    "out", "", "The page. Without this flag the page is report.html in the only folder.", flag_values=FLAGS
)
ABOUT = """usage: python -m kd_jax.report DIR [DIR ...] [--out=FILE.html]

Makes the page of a run, an evaluation or an ablation again, or puts several results on one page. Each DIR is the folder
of a run, an evaluation or an ablation."""


def main() -> None:
    command.start()
    values, folders = command.parse("report", FLAGS, sys.argv[1:], about=ABOUT, positional="DIR")
    out = values["out"]
    with command.ends_well("kd_jax.report", lambda: "the folders are unchanged"), contextlib.ExitStack() as stack:
        stack.enter_context(storage.room(out or folders[0]))
        copies = (remote.work_directory(folder, writes=not out, unread=remote.HEAVY, alone=False) for folder in folders)
        print(f"wrote {report.write([stack.enter_context(copy)[0] for copy in copies], out)}")


if __name__ == "__main__":
    main()
