"""The jobs that benchmarks/ensemble.py times: `python ensemble_workers.py prepare|trl|steelyard ...`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def prepare(folder: Path, model: str, data: str) -> None:
    """The first usable pairs as a preference file and as tokens, and a reward model with a seeded head for TRL."""
    from steelyard.data.encode import Encoder
    from steelyard.data.export import write_preferences
    from steelyard.data.load import load_preferences
    from steelyard.models.reward import RewardModel

    wanted = json.loads((folder / "settings.json").read_text())
    encoder = Encoder.load(model, max_length=wanted["max_length"], on_overlong="drop")
    loaded = load_preferences(data, on_invalid="skip").preferences
    encoded = encoder.encode(loaded)
    if len(encoded.trees) < wanted["pairs"]:
        sys.exit(f"{data}: has {len(encoded.trees)} pairs within {wanted['max_length']} tokens")
    write_preferences([loaded[i] for i in encoded.index[: wanted["pairs"]]], folder / "pairs.jsonl")
    rows = [
        {f"{side}_ids": [*t.prompt, *r] for side, r in zip(("chosen", "rejected"), t.responses, strict=True)}
        for t in encoded.trees[: wanted["pairs"]]
    ]
    (folder / "tokens.json").write_text(json.dumps(rows))
    RewardModel.from_language_model(model, pad_id=encoder.pad_id, seed=0).save(folder / "start", encoder)


def trl(folder: Path, target: Path, seed: int) -> None:
    """One member by RewardTrainer as it comes: one pass, then the scores of all pairs."""
    import numpy as np
    import torch
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer  # type: ignore[import-not-found]

    wanted = json.loads((folder / "settings.json").read_text())
    rows: list[dict[str, Any]] = json.loads((folder / "tokens.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        args = RewardConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=wanted["precision"] == "bfloat16",
            max_length=wanted["max_length"],
            per_device_train_batch_size=wanted["micro"],
            gradient_accumulation_steps=wanted["batch"] // wanted["micro"],
            num_train_epochs=1,
            learning_rate=wanted["lr"],
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        trainer = RewardTrainer(model=str(folder / "start"), args=args, train_dataset=Dataset.from_list(rows))
        trainer.train()
    model = trainer.model.eval()
    sides = []
    for side in ("chosen_ids", "rejected_ids"):
        parts = []
        for i in range(0, len(rows), 2 * wanted["micro"]):
            texts = [torch.tensor(row[side]) for row in rows[i : i + 2 * wanted["micro"]]]
            ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=model.config.pad_token_id)
            lengths = torch.tensor([len(t) for t in texts])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                parts.append(model(input_ids=ids, attention_mask=mask).logits.float())
        sides.append(torch.cat(parts))
    target.mkdir(exist_ok=True)
    np.save(target / f"{seed}.npy", torch.cat(sides, 1).numpy())


def steelyard(folder: Path, target: Path, members: int, model: str) -> None:
    """All members by the command that a user gives."""
    from steelyard.cli import main

    wanted = json.loads((folder / "settings.json").read_text())
    command = ["strength", "--data", folder / "pairs.jsonl", "--model", model, "--out", target, "--members", members]
    command += ["--backend", "full", "--scoring", "in-sample", "--workers", 1, "--precision", wanted["precision"]]
    command += ["--max-length", wanted["max_length"], "--member.batch-size", wanted["batch"]]
    command += ["--member.optim.lr", wanted["lr"]]
    sys.exit(main([str(part) for part in command]))


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), *sys.argv[3:5])
    elif sys.argv[1] == "trl":
        trl(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        steelyard(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
