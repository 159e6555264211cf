"""Prints the collectives of a train step and their bytes on each mesh, read from the HLO text of the compiled program.

python -m experiments.step_cost.collectives
"""

import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from tests.helpers.collectives import KINDS, MESHES, compiled_step, read


def main() -> None:
    sizes = dict(batch=16, length=96, vocab=8192, width=64, teacher_width=128, chunk=128)
    print(", ".join(f"{name} {value}" for name, value in sizes.items()), "\n")
    print("| data, fsdp, tensor | where | collective | number | MB a device |\n| --- | --- | --- | --: | --: |")
    for mesh in MESHES:
        collectives = read(compiled_step(mesh, **sizes))
        for in_loop in (False, True):
            for kind in KINDS:
                chosen = [c for c in collectives if c.kind == kind and c.in_loop == in_loop]
                if chosen:
                    where = "each chunk" if in_loop else "once a step"
                    print(f"| {mesh} | {where} | {kind} | {len(chosen)} | {sum(c.size for c in chosen) / 1e6:.3f} |")


if __name__ == "__main__":
    main()
