"""The tokenizer and the stream of tokens that is trained on."""

from dataclasses import dataclass

import torch
from folder import END_OF_TEXT, END_OF_TEXT_ID
from text import Chapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_tokenizer(chapters: list[Chapter], size: int) -> Tokenizer:
    """Train a byte-level BPE: any text survives encoding and decoding, since all 256 bytes are in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(chapter) for chapter in chapters), trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """Token ids as one stream: paragraphs end with a line break, chapters with END_OF_TEXT."""

    stream: torch.Tensor
    """[tokens], int64."""
    starts: torch.Tensor
    """[paragraphs], int64: where each paragraph begins."""

    @classmethod
    def encode(cls, chapters: list[Chapter], tokenizer: Tokenizer) -> "Corpus":
        """Encode chapters in order."""
        ids: list[int] = []
        starts: list[int] = []
        for chapter in chapters:
            for paragraph in chapter:
                starts.append(len(ids))
                ids += tokenizer.encode(paragraph + "\n").ids
            ids[-1] = END_OF_TEXT_ID
        return cls(torch.tensor(ids), torch.tensor(starts))

    def sample(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Draw `count` windows of `length` + 1 tokens: [count, length + 1].

        Every second one begins at a paragraph, as a prompt does; the others begin anywhere.
        """
        last = len(self.stream) - length - 1
        aligned = self.starts[torch.randint(len(self.starts), (count // 2,), generator=generator)]
        anywhere = torch.randint(last, (count - count // 2,), generator=generator)
        begin = torch.cat([aligned.clamp(max=last), anywhere])
        return self.stream[begin[:, None] + torch.arange(length + 1)]

    def windows(self, length: int) -> torch.Tensor:
        """Cut the whole stream into windows that overlap by one token: [windows, length + 1]."""
        return self.stream.unfold(0, length + 1, length)
