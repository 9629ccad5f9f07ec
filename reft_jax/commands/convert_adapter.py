"""The command `convert adapter`: a base model and a PEFT adapter of it (LoRA) as one model folder."""

from pathlib import Path

from reft_jax.model import families
from reft_jax.model.hf import load_hf, stored_type
from reft_jax.model.hf_write import save_hf
from reft_jax.model.lora import joined, merged_model
from reft_jax.model.peft import read_peft
from reft_jax.model_folder import check_new_folder
from reft_jax.run.inputs import checked_tokenizer
from reft_jax.store import writing


def run_convert_adapter(source: Path, base: Path, out_dir: Path, family: str = "") -> None:
    """Writes `out_dir` in the number format of `base`; each matrix is added up in float32.

    family: that of `base`, as the setting model.family. Raises InputError if `source` is not a LoRA adapter of `base`;
    SaveError if `out_dir` cannot be written.
    """
    families.use(family, "--family")
    check_new_folder("--out_dir", out_dir)
    tokenizer = checked_tokenizer(base)
    dtype = stored_type(base)
    model, lm = load_hf(base, dtype=dtype)
    lora, adapter = read_peft(source, model.config, lm["layers"])
    with writing(out_dir):
        save_hf(out_dir, model, merged_model(joined(lm, adapter, lora)), tokenizer=tokenizer, dtype=dtype)
    print(f"{base} + {source} -> {out_dir}: rank {lora.rank}, {', '.join(lora.targets)}")
