"""What PyTorch's scaled_dot_product_attention does on this GPU for shapes of cuda_prefill_bench.cc: contiguous K and V, no
block table. Run it beside that benchmark, in the same session."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = [
    ("Llama-3.1-8B, 8,192 tokens", 32, 8, 128, 8192, 1),
    ("  2,048 tokens", 32, 8, 128, 2048, 1),
    ("  8 prompts of 1,024", 32, 8, 128, 1024, 8),
    ("Qwen3-0.6B, 8,192 tokens", 16, 8, 128, 8192, 1),
    ("32 heads of 64, 8,192 tokens", 32, 8, 64, 8192, 1),
]


def measure(call, rounds=20, launches=5):
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / launches)
    return sorted(times)[rounds // 2]


for name, heads, kv_heads, width, tokens, batch in CASES:
    q = torch.randn(batch, heads, tokens, width, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, kv_heads, tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flop = 4 * width * heads * batch * tokens * (tokens + 1) / 2
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                ms = measure(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
            print(f"{name:32} {backend.name:18} {ms:8.4f} ms {flop / ms / 1e9:7.1f} TFLOP/s")
        except RuntimeError as error:
            print(f"{name:32} {backend.name:18} {str(error).splitlines()[0]}")
