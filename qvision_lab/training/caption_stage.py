"""Stage two: with eyes that can see, learn to say what is there.

The tower stays frozen, as CLIP does in the published model, so its states for a picture never
change: they are computed once, and the Q-Former, the bridge and GPT-Neo are trained on them from
random weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import CLIPVisionModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qvision_lab import scenes
from qvision_lab.model.captioner import (
    IGNORED_LABEL,
    QVisionForConditionalGeneration,
    generation_preset,
)
from qvision_lab.model.config import QVisionConfig
from qvision_lab.model.processor import QVisionProcessor
from qvision_lab.scenes.captions import tell
from qvision_lab.scenes.layout import layout
from qvision_lab.training.trainer import run_stage
from qvision_lab.training.vision_stage import filled_once, normalise

SPECIAL_TOKENS = {"pad_token": "<PAD>", "bos_token": "<START>", "eos_token": "<END>"}


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Radford et al. 2019) of its own: short for Scenes, able to spell anything.

    Captions are learned with a space before and after, as the model's text has them.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (f" {caption} " for caption in captions),
        vocab_size=vocab_size,
        min_frequency=10,
        special_tokens=list(SPECIAL_TOKENS.values()),
        show_progress=False,
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **SPECIAL_TOKENS)


@dataclass(frozen=True)
class SeenScenes:
    """Scenes as the frozen tower sees them: `states[i]` belongs to scene (`split`, `seed`, i)."""

    split: str
    seed: int
    states: Float[np.ndarray, "N P C"]


def see_scenes(
    tower: CLIPVisionModel, folder: Path, n: int, split: str, seed: int, workers: int
) -> SeenScenes:
    """Draw `n` scenes and keep the tower's states in half precision (19 kB each), in memory.

    They are computed once, and then read from a file in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"states-{split}-{seed}-{n}.npy"
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    drawn = scenes.generate(n, split=split, seed=seed, workers=workers)
    shape = (n, patches, tower.config.hidden_size)
    states = filled_once(path, np.dtype(np.float16), shape, _see(tower, drawn))
    return SeenScenes(split, seed, states)


@torch.no_grad()
def _see(tower: CLIPVisionModel, drawn: Iterator[scenes.Scene]) -> Iterator[np.ndarray]:
    while some := list(islice(drawn, 64)):
        pixels = np.stack([np.asarray(scene.image) for scene in some])
        yield from tower(normalise(pixels)).last_hidden_state[:, 1:].numpy()  # [B,P,C]


class CaptionedStates(Dataset):
    """Frozen states with captions: every visit to a picture brings the next few of its captions.

    Args:
        captions_per_picture: of five, that there are.
    """

    def __init__(
        self,
        seen: SeenScenes,
        processor: QVisionProcessor,
        captions_per_visit: int,
        captions_per_picture: int = 5,
    ):
        self.states = seen.states
        self.captions_per_visit = captions_per_visit
        layouts = (layout(seen.split, seen.seed, i) for i in range(len(seen.states)))
        told = (tell(scene, captions_per_picture) for scene in layouts)
        bar = tqdm(told, "telling", total=len(seen.states), unit="scene")
        self.captions = [[processor.encode(caption) for caption in captions] for captions in bar]

    def __len__(self) -> int:
        return len(self.states) * len(self.captions[0])

    def __getitem__(self, index: int) -> dict[str, Tensor | list[Tensor]]:
        visit, picture = divmod(index, len(self.states))
        captions = self.captions[picture]
        first = visit * self.captions_per_visit
        chosen = [captions[(first + k) % len(captions)] for k in range(self.captions_per_visit)]
        states = torch.from_numpy(self.states[picture].astype(np.float32))
        return {"vision_states": states, "captions": chosen}


@dataclass(frozen=True)
class CaptionCollator:
    """Stacks pictures and, next to each other, their captions, padded on the right.

    Args:
        multiple: lengths are those of it, so that they are few.
    """

    pad_token_id: int
    multiple: int = 1

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        rows = [caption for sample in samples for caption in sample["captions"]]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)  # [R,T]
        missing = -input_ids.shape[1] % self.multiple
        input_ids = nn.functional.pad(input_ids, (0, missing), value=self.pad_token_id)
        labels = input_ids.masked_fill(input_ids == self.pad_token_id, IGNORED_LABEL)
        labels[:, 0] = IGNORED_LABEL  # never a target, so it must not count as one
        looks = samples[0].keys() - {"captions"}  # vision_states [B,P,C] or pixel_values [B,3,H,W]
        seen = {name: torch.stack([sample[name] for sample in samples]) for name in looks}
        return {**seen, "input_ids": input_ids, "labels": labels}


@torch.no_grad()
def caption_seen(
    model: QVisionForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, seen: SeenScenes
) -> list[str]:
    """A greedy caption of each scene seen."""
    settings = generation_preset("greedy", model.config)
    texts = []
    for start in range(0, len(seen.states), 100):
        states = torch.from_numpy(seen.states[start : start + 100].astype(np.float32))
        ids = model.generate(vision_states=states.to(model.device), generation_config=settings)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def measure_truth(
    model: QVisionForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, seen: SeenScenes
) -> dict[str, float]:
    """Rates of `scenes.score`, 0 to 1, of greedy captions of all scenes seen."""
    texts = caption_seen(model, tokenizer, seen)
    checks = [scenes.check(text, layout(seen.split, seen.seed, i)) for i, text in enumerate(texts)]
    return {name.replace(" ", "_"): rate.value for name, rate in scenes.score(checks).items()}


def learn_to_tell(
    tower: CLIPVisionModel,
    config: QVisionConfig,
    tokenizer: PreTrainedTokenizerBase,
    stage: dict,
    seed: int,
    folder: Path,
    states: Path | None = None,
) -> QVisionForConditionalGeneration:
    """Run the stage, or take it up where it stopped; returns the whole captioner.

    Args:
        states: folder of what the tower saw, for runs that share a tower; by default the run's.
    """
    states, workers = states or folder, stage["workers"]
    held_out = see_scenes(tower, states, stage["held_out"], "val", 0, workers)
    captioned = CaptionedStates(
        see_scenes(tower, states, stage["pictures"], "train", 0, workers),
        QVisionProcessor.from_config(config, tokenizer),
        stage["captions_per_visit"],
        stage.get("captions_per_picture", 5),
    )
    torch.manual_seed(seed)
    model = QVisionForConditionalGeneration(config)
    model.vision.tower.load_state_dict(tower.state_dict())
    model.vision.tower.requires_grad_(False)
    run_stage(
        model,
        stage,
        seed,
        folder,
        measure=lambda model: measure_truth(model, tokenizer, held_out),
        data_collator=CaptionCollator(config.pad_token_id),
        dataset=captioned,
    )
    return model.eval()
