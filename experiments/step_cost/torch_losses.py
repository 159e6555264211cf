"""Measures the losses of Liger Kernel and TRL on a CPU at the shapes of `loss_cost.py`.

The script runs in an environment of its own:

python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 trl==1.16.0 liger-kernel
OMP_WAIT_POLICY=passive PEERS/bin/python experiments/step_cost/torch_losses.py --impl=liger --loss=forward_kl

Every position counts, as in `loss_cost.py --masked=0 --against=nothing`. Waiting threads sleep and use no CPU time.
Prints a JSON line with the minimum CPU seconds of value and gradient, and the peak of resident memory above its start.
"""

import argparse
import json
import time
from importlib import metadata

import torch

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}  # the same numbers in both libraries


def memory_mb(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(key))


def liger(beta, compiled):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    return lambda hs, ws, ht, wt, labels: loss(hs, ws, ht, wt, labels)


def trl(beta):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(hs, ws, ht, wt, labels):
        per_token, _ = ChunkedDivergenceFunction.apply(
            hs, ws, None, ht, wt, None, beta, 1.0, 1.0, None, 1.0, None
        )  # fmt: skip
        return per_token.mean()

    return loss


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--impl", choices=["liger", "liger_compiled", "trl"], required=True)
    parser.add_argument("--loss", choices=list(BETA), default="forward_kl")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--student", type=int, default=256)
    parser.add_argument("--teacher", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    beta = BETA[args.loss]
    loss = trl(beta) if args.impl == "trl" else liger(beta, compiled=args.impl == "liger_compiled")

    torch.manual_seed(0)
    hs, ht = (torch.randn(args.tokens, width) for width in (args.student, args.teacher))
    ws, wt = (torch.randn(args.vocab, width) * 2 / width**0.5 for width in (args.student, args.teacher))
    hs.requires_grad_(), ws.requires_grad_()
    labels = torch.zeros(args.tokens, dtype=torch.long)

    def run():
        hs.grad = ws.grad = None
        loss(hs, ws, ht, wt, labels).backward()

    before = memory_mb("VmRSS")
    run()
    with open("/proc/self/clear_refs", "w") as file:  # reset the peak, so that it is the peak of the measured rounds
        file.write("5")
    seconds = []
    for _ in range(args.rounds):
        start, wall = time.process_time(), time.perf_counter()
        run()
        seconds.append((time.process_time() - start, time.perf_counter() - wall))
    line = {"impl": args.impl} | {key: vars(args)[key] for key in ("loss", "tokens", "vocab", "student", "teacher")}
    cpu, wall = (round(min(column), 4) for column in zip(*seconds, strict=True))
    line |= {"cpu_s": cpu, "wall_s": wall, "peak_over_mb": round(memory_mb("VmHWM") - before, 1)}
    versions = {name: metadata.version(name) for name in ("torch", "liger-kernel", "trl")}
    print(json.dumps(line | versions))


if __name__ == "__main__":
    main()
