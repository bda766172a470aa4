"""Prune a small vision transformer to 80 % while transformers' Trainer trains it on scikit-learn's digits.

python examples/trainer.py [folder]    goes on from the last checkpoint in the folder; trainer_output/ by default

It needs pip install 'fastfisher[hf]' scikit-learn.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.trainer_utils import get_last_checkpoint

import fastfisher as ff
from fastfisher.integrations.transformers import PruningCallback


def digits() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Images of 8 x 8 for training and for evaluation."""
    images, labels = load_digits(return_X_y=True)
    samples = [
        {"pixel_values": torch.tensor(image, dtype=torch.float32).reshape(1, 8, 8) / 16, "labels": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    return [samples[i] for i in order[:1400]], [samples[i] for i in order[1400:]]


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of the images whose largest logit is that of the label."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(folder: str, epochs: int = 24) -> PruningCallback:
    """Train, prune from a third of the epochs on, and leave the last quarter to recovery."""
    torch.manual_seed(0)
    checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
    )
    # transformers 5 renames a ViT's weights in its files, which from_pretrained undoes and the Trainer forgets
    model = (
        ViTForImageClassification.from_pretrained(checkpoint)
        if checkpoint
        else ViTForImageClassification(config)
    )
    train, test = digits()
    callback = PruningCallback(
        schedule=ff.CubicSchedule(
            0.2, 0.8, begin=epochs // 3, end=3 * epochs // 4, every=max(1, epochs // 8)
        ),
        method="woodtaylor",
        ignore="classifier",
        num_grads=256,
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return callback


if __name__ == "__main__":
    pruner = main(sys.argv[1] if sys.argv[1:] else "trainer_output").pruner
    if pruner is not None:
        print(f"{pruner.sparsity:.1%} of the weights are zero")
