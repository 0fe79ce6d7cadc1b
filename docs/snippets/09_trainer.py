"""The Trainer by hand: one optimizer step on samples of your choice, for loops of your own."""

import gristmill
from gristmill.data.chat import Message
from gristmill.data.find_format import find_format
from gristmill.data.rows import Demonstration
from gristmill.train.objectives.next_token import next_token_objective
from gristmill.train.objectives.sft import demonstration_samples
from gristmill.train.trainer import TrainSettings

model, tokenizer = gristmill.load("miniature")
rows = [Demonstration(str(n), "", (Message("user", f"Say {n}."), Message("assistant", f"{n}!")), "human") for n in range(8)]
samples = demonstration_samples(rows, find_format("auto", tokenizer), tokenizer)
trainer = gristmill.Trainer(model, next_token_objective, TrainSettings(lr=1e-3, steps=3, batch_size=4))
for step in range(3):
    metrics = trainer.step(samples[step : step + 4])
    print(step, metrics["loss"], metrics["grad_norm"])
