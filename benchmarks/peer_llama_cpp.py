"""The sampling workload of speed.py on llama.cpp (CPU), many rows per step: useful tokens per second as one JSON line.

    pip install llama-cpp-python gguf safetensors torch                          (an environment of its own)
    python benchmarks/peer_llama_cpp.py sample --model DIR --workload FILE [--dtype float32|bfloat16] [--slots 64]

The folder of a llama or qwen2 model is first written as a GGUF file, without its tokenizer. Weights and KV cache are in
--dtype. Each prompt is computed once and its cache copied to all of its completions, as our engine does. Every
completion runs to its forced length, drawn at temperature 1.
"""

import argparse
import ctypes
import json
import os
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp as lib
from safetensors.torch import load_file

TYPES = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(folder: Path, path: str, dtype: str) -> None:
    """The weights of a Hugging Face folder as a GGUF file; matrices in `dtype`, vectors in float32."""
    config = json.loads((folder / "config.json").read_text())
    family, heads = config["model_type"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, {"llama": "llama", "qwen2": "qwen2"}[family])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    kind = TYPES[dtype]
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            values = tensor.float().numpy()
            if name in NAMES:
                target = NAMES[name]
            else:
                _, _, layer, part = name.split(".", 3)
                part, suffix = part.rsplit(".", 1)
                target = f"blk.{layer}.{PARTS[part]}.{suffix}"
                if family == "llama" and PARTS[part] in ("attn_q", "attn_k"):  # llama.cpp rotates neighbours of a pair
                    rows = heads if PARTS[part] == "attn_q" else config["num_key_value_heads"]
                    values = values.reshape(rows, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            if values.ndim == 1:
                writer.add_tensor(target, values)
            else:
                writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Rows:
    """A llama.cpp context with `slots` rows that are decoded together, and a row for each prompt's cache."""

    def __init__(self, path: str, slots: int, prompts: list[list[int]], longest: int, dtype: str):
        self.slots, self.prompts = slots, prompts
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_seq_max, params.kv_unified = slots + len(prompts), True
        params.n_ctx = sum(map(len, prompts)) + slots * longest
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = os.cpu_count()
        params.type_k = params.type_v = TYPES[dtype]
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp made no context")
        self.memory = lib.llama_get_memory(self.context)
        self.batch = lib.llama_batch_init(512, 0, 1)
        self.sampler = lib.llama_sampler_init_dist(0)

    def compute(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Appends tokens (id, position, row, whether its logits are needed), at most 512."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, row, logits) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, logits
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
        if lib.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")

    def prefill(self) -> None:
        """Computes all prompts but their last tokens, with which their completions begin."""
        for p, ids in enumerate(self.prompts):
            lib.llama_memory_seq_rm(self.memory, self.slots + p, -1, -1)
            self.compute([(token, at, self.slots + p, False) for at, token in enumerate(ids[:-1])])

    def run(self, wanted: list[tuple[int, int]]) -> list[list[int]]:
        """Completes (number of a prompt, tokens to draw) in order, `slots` at a time; returns the ids drawn."""
        self.prefill()
        waiting, rows, drawn = list(enumerate(wanted))[::-1], {}, [[] for _ in wanted]
        while waiting or rows:
            for slot in range(self.slots):
                if slot not in rows and waiting:
                    number, (p, length) = waiting.pop()
                    rows[slot] = number, p, length
                    lib.llama_memory_seq_rm(self.memory, slot, -1, -1)
                    lib.llama_memory_seq_cp(self.memory, self.slots + p, slot, -1, -1)
            order = sorted(rows)
            step = []
            for slot in order:
                number, p, _ = rows[slot]
                last = drawn[number][-1] if drawn[number] else self.prompts[p][-1]
                step.append((last, len(self.prompts[p]) - 1 + len(drawn[number]), slot, True))
            self.compute(step)
            for at, slot in enumerate(order):
                number, _, length = rows[slot]
                drawn[number].append(lib.llama_sampler_sample(self.sampler, self.context, at))
                if len(drawn[number]) == length:
                    del rows[slot]
        return drawn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["sample"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--slots", type=int, default=64)
    options, _ = parser.parse_known_args()  # speed.py also gives what its other peers need
    work = json.loads(options.workload.read_text())
    wanted = [(p, length) for p, lengths in enumerate(work["lengths"]) for length in lengths]
    quiet = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(quiet, ctypes.c_void_p())
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.gguf"
        write_gguf(options.model, path, options.dtype)
        longest = max(map(len, work["prompts"])) + max(map(max, work["lengths"]))
        rows = Rows(path, options.slots, work["prompts"], longest, options.dtype)
    rows.run(wanted[:4])
    started = time.perf_counter()
    tokens = sum(map(len, rows.run(wanted)))
    seconds = time.perf_counter() - started
    print(json.dumps({"what": "sample", "tok_s": tokens / seconds, "tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
