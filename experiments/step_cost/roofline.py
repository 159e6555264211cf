"""Calculates operations, bytes and time of the loss and of a step on accelerators. Nothing is run.

The bytes are those of the passes of this implementation over the logits. Each pass is fused as XLA fuses it on a CPU.
The bytes of a step do not include the activations of the blocks.

python -m experiments.step_cost.roofline

The peaks are from the data sheet of NVIDIA's H100 SXM (989 TFLOP/s dense bfloat16, 3.35 TB/s) and from Google Cloud's
page on TPU v5p (459 TFLOP/s, 2.765 TB/s).
"""

PEAKS = {"H100 SXM": (989e12, 3.35e12), "TPU v5p": (459e12, 2.765e12)}
CHUNK = 2048  # tokens in a chunk of token_sum on an accelerator


def head_loss(tokens: int, vocab: int, student: int, teacher: int) -> tuple[float, float]:
    """Returns FLOP and bytes of the loss in bfloat16, with logits and the head's gradient in float32."""
    # The student has a forward product and two gradients, and the teacher a forward product.
    flop = 2 * tokens * vocab * (3 * student + teacher)
    chunks = -(-tokens // CHUNK)
    # Each chunk reads the student's head twice and the teacher's head once.
    heads = 2 * vocab * (2 * student + teacher) * chunks
    gradient = 2 * 4 * vocab * student * chunks  # of the head; read and written
    # Both models' logits are written once and read four times in float32: maximum, sum, loss, gradient. The gradient is
    # written and read twice in bfloat16.
    logits = tokens * vocab * (2 * 4 * 5 + 2 * 3)
    return flop, heads + gradient + logits


def step(tokens: int, vocab: int, student: dict, teacher: dict) -> tuple[float, float]:
    """Returns FLOP and bytes of a whole step: blocks, loss, and AdamW in float32, without the attention scores."""
    flop, moved = head_loss(tokens, vocab, student["width"], teacher["width"])
    flop += 2 * tokens * (3 * student["blocks"] + teacher["blocks"])
    parameters = student["blocks"] + vocab * student["width"]
    moved += 4 * parameters * 8  # parameters, two moments and the gradient, each read and written
    moved += 2 * (3 * student["blocks"] + teacher["blocks"])  # weights, read once per pass
    return flop, moved


def main() -> None:
    jobs = {
        "loss: N 8,192, V 128,256, D 4,096 and 4,096": head_loss(8192, 128_256, 4096, 4096),
        "loss: N 16,384, V 151,936, D 896 and 1,536": head_loss(16_384, 151_936, 896, 1536),
        "step: Qwen2.5 1.5B into 0.5B, N 16,384": step(
            16_384, 151_936, {"width": 896, "blocks": 0.358e9}, {"width": 1536, "blocks": 1.31e9}
        ),
    }
    print("| job | TFLOP | GB | device | products, ms | memory, ms | one after the other, ms |")
    print("| --- | --: | --: | --- | --: | --: | --: |")
    for job, (flop, moved) in jobs.items():
        for device, (compute, bandwidth) in PEAKS.items():
            a, b = 1e3 * flop / compute, 1e3 * moved / bandwidth
            print(f"| {job} | {flop / 1e12:.1f} | {moved / 1e9:.1f} | {device} | {a:.1f} | {b:.1f} | {a + b:.1f} |")


if __name__ == "__main__":
    main()
