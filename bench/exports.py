"""Load what `gristmill synth` exported as its users do: with `datasets` from the card, and one step each of TRL's SFT and DPO trainers.

    trl_venv/bin/python bench/exports.py runs/domain

Needs an environment with datasets, trl and transformers (README.md beside this file makes one), not gristmill. Prints one line of JSON;
a file that cannot be loaded or trained on is an error.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer(texts: list[str]) -> Any:
    """Words of the data, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=4000, special_tokens=["<unk>", "<pad>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", chat_template=TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="run folder of `gristmill synth`")
    folder = parser.parse_args().folder.resolve()
    import datasets
    import trl
    from transformers import LlamaConfig, LlamaForCausalLM

    datasets.disable_progress_bars()
    result: dict[str, Any] = {"versions": {"datasets": datasets.__version__, "trl": trl.__version__}}
    with tempfile.TemporaryDirectory() as work:
        for name in datasets.get_dataset_config_names(str(folder)):
            data = datasets.load_dataset(str(folder), name, split="train", cache_dir=work)
            texts = [json.dumps(row) for row in data]
            words = tokenizer([t.replace('"', " ") for t in texts])
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
            # TRL looks the model up by its folder
            model = Path(work) / f"{name}-model"
            LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=1, **sizes)).save_pretrained(model)
            words.save_pretrained(model)
            common = {"output_dir": work, "max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
            kinds = {"sft": (trl.SFTTrainer, trl.SFTConfig), "preference": (trl.DPOTrainer, trl.DPOConfig)}
            trainer, settings = kinds[name]
            args = settings(**common, disable_tqdm=True)
            done = trainer(LlamaForCausalLM.from_pretrained(model), args=args, train_dataset=data, processing_class=words).train()
            result[name] = {"rows": len(data), "columns": data.column_names, "loss": round(done.training_loss, 4)}
    if not {"sft", "preference"} & set(result):
        sys.exit(f"{folder} has no dataset card with data.")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
