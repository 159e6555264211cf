"""Measures transformers' `generate` on random weights at the shapes of `ours.py`, in an environment of its own.

python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 transformers==5.24.0
OMP_WAIT_POLICY=passive PEERS/bin/python experiments/generation_speed/transformers_generate.py --size=smollm2

Waiting threads sleep and use no CPU time. Prints a JSON line as `ours.py` does.
"""

import argparse
import json
import time
from importlib import metadata
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = json.loads((Path(__file__).parent / "sizes.json").read_text())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(SIZES), default="smollm2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--calls", type=int, default=5)
    args = parser.parse_args()

    names = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
    sizes = {names.get(key, key): value for key, value in SIZES[args.size].items()}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    prompts = torch.randint(sizes["vocab_size"], (args.batch, args.prompt))
    settings = dict(max_new_tokens=args.new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    @torch.inference_mode()
    def run():
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
        assert tokens.shape == (args.batch, args.prompt + args.new)

    run()
    seconds = []
    for _ in range(args.calls):
        start, wall = time.process_time(), time.perf_counter()
        run()
        seconds.append((time.process_time() - start, time.perf_counter() - wall))
    cpu, wall = (round(min(column), 4) for column in zip(*seconds, strict=True))
    line = {"impl": "transformers", "parameters": sum(p.numel() for p in model.parameters())} | vars(args)
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps(line | {"cpu_s": cpu, "wall_s": wall} | versions))


if __name__ == "__main__":
    main()
