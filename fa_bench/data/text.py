"""Text, as sequences of characters, bytes or byte-pair-encoding tokens.

Shapes: N batch, T positions, L tokens of a part of the text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fa_bench.data.base import Dataset
from fa_bench.data.splits import Split, Splits
from fa_bench.errors import DataError, OptionError, names, printable
from fa_bench.registry.kinds import POSITIONS, TOKENS
from fa_bench.registry.options import option
from fa_bench.registry.registries import DATASETS
from fa_bench.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

#: The file that is read if no path is given, and the number of different bytes, all of which are in the vocabulary of byte-pair
#: encoding.
BUILT_IN, BYTES = Path(__file__).with_name("alice.txt"), 256
UNKNOWN = "<unk>"
#: A function that converts text to token indices, and the names of the tokens.
Encoding = tuple[Callable[[str], Sequence[int]], list[str]]


@DATASETS.register("text")
@dataclasses.dataclass(eq=False)
class Text(Dataset):
    """Language modelling: predict every token of a text from the tokens before it. By default, the text is Alice's Adventures in
    Wonderland, and its characters are the tokens.

    The built-in text is Lewis Carroll's novel of 1865, which is in the public domain. It has 148,331 characters, 70 of them
    distinct. The transcription comes from the Canterbury corpus (alice29.txt), without the title and with Unix line endings.

    A text is one UTF-8 file, or all .txt files in a folder and its subfolders, in the order of their paths. Windows line endings
    are converted. The first part of the text is for training, the next is for validation, and the last is for testing. A sample
    is a window of `context` tokens, and the target for each token is the token that follows it. Windows do not overlap. During
    training, the windows are shuffled, and each epoch shifts all of them by an offset from 0 to `context` - 1. The order and the
    offset depend only on the seed and the epoch.

    With unit=characters, the vocabulary consists of the characters in the training part and `<unk>`, which replaces all others. A
    note says how many were replaced. With unit=bytes, the vocabulary consists of the 256 bytes. With unit=bpe, byte-pair encoding
    is learned from the training part only, with the tokenizers package (pip install fa_bench[text]).
    """

    path: str | None = option(None, "a UTF-8 file, or a folder of .txt files; null: Alice's Adventures in Wonderland")
    unit: str = option("characters", "unit of tokens", choices=["characters", "bytes", "bpe"])
    vocabulary: int = option(512, "number of tokens with unit=bpe, including the 256 bytes", minimum=BYTES + 1, maximum=1_000_000)
    context: int = option(64, "tokens in a sequence", minimum=1)
    validation: float = option(
        0.1, "fraction of the text for validation, between the parts for training and testing; 0: none", minimum=0, below=1
    )
    test: float = option(0.1, "fraction of the text for testing, at its end", above=0, below=1)

    validation_seed: int = dataclasses.field(init=False, default=0)
    holds_out: ClassVar[bool] = False
    inputs: ClassVar[str] = TOKENS
    targets: ClassVar[str] = POSITIONS

    def check(self) -> None:
        super().check()
        if self.validation + self.test >= 1:
            raise OptionError("validation", f"={self.validation:g} and test={self.test:g} leave nothing for training")
        if self.unit == "bpe":
            require_tokenizers()

    def read(self, data_dir: Path, device: torch.device) -> Splits:
        text = read_text(BUILT_IN if self.path is None else Path(self.path))
        ends = round((1 - self.validation - self.test) * len(text)), round((1 - self.test) * len(text))
        parts = {"train": text[: ends[0]], "validation": text[ends[0] : ends[1]], "test": text[ends[1] :]}
        encode, vocabulary = self._encoding(parts["train"])
        digest, splits, notes = hashlib.sha256("\n".join(vocabulary).encode()), {}, []
        for name, part in parts.items():
            tokens = torch.tensor(encode(part), dtype=torch.int64)
            digest.update(tokens.numpy().data)
            splits[name] = WindowSplit(tokens, self.context, name == "train", device, len(part) / max(len(tokens), 1))
            if not len(splits[name]) and (name != "validation" or self.validation):
                raise OptionError(
                    "dataset.context",
                    f"={self.context}: the {name} part has only {len(tokens)} tokens; use a shorter context or a longer text",
                )
            if self.unit == "characters" and (unknown := int((tokens == 0).sum())):
                notes.append(f"{name} part: {unknown} characters that are not in the training part, read as {UNKNOWN}")
        return Splits(
            splits["train"],
            splits["validation"] if self.validation else None,
            splits["test"],
            vocabulary,
            (self.context,),
            digest.hexdigest(),
            notes,
        )

    def _encoding(self, text: str) -> Encoding:
        """The encoding for the option `unit`, based on the text of the training part."""
        if self.unit == "bytes":
            return lambda part: list(part.encode()), [f"{byte:#04x}" for byte in range(BYTES)]
        if self.unit == "bpe":
            return _byte_pairs(text, self.vocabulary)
        characters = sorted(set(text))
        number = {character: index for index, character in enumerate(characters, start=1)}
        return lambda part: [number.get(character, 0) for character in part], [UNKNOWN, *characters]


class WindowSplit(Split):
    """A split of windows from a text that stays on the device.

    Args:
        tokens: int64 (L,).
        context: T, tokens in a window.
        moves: whether each epoch shifts the windows by a random offset from 0 to T - 1 tokens.
        device: the device of the tokens.
        characters: mean number of characters per token.
        starts: the starts of the windows, (n,); None: the multiples of T.
    """

    def __init__(
        self, tokens: Tensor, context: int, moves: bool, device: torch.device, characters: float, starts: Tensor | None = None
    ) -> None:
        self.tokens, self.context, self.moves, self.device = tokens.to(device), context, moves, device
        self.characters = characters
        # The last target of a window is the token after the window, and training windows may be shifted by up to T - 1 tokens.
        count = max((len(tokens) - 1 - (context - 1) * moves) // context, 0)
        self.starts = (torch.arange(count) * context if starts is None else starts).to(device)

    def __len__(self) -> int:
        return len(self.starts)

    def subset(self, indices: Tensor) -> WindowSplit:
        return WindowSplit(
            self.tokens, self.context, self.moves, self.device, self.characters or 1.0, self.starts[indices.to(self.device)]
        )

    @property
    def varies(self) -> bool:
        return self.moves

    @property
    def is_indexed(self) -> bool:
        return not self.moves

    def gather(self, chunks: Iterator[Tensor], key: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        generator = None if key is None else torch.Generator().manual_seed(key)
        offset = 0 if generator is None else int(torch.randint(self.context, (), generator=generator))
        places = torch.arange(self.context, device=self.device) + offset
        for chunk in chunks:
            at = self.starts[chunk.to(self.device)].unsqueeze(1) + places
            yield self.tokens[at], self.tokens[at + 1]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of all .txt files in a folder and its subfolders, in the order of their paths.

    Raises:
        DataError: if a file is missing or not UTF-8, or if there is no text; the message names the file or folder.
    """
    if path.is_dir():
        files = sorted(filter(Path.is_file, path.rglob("*.txt")), key=lambda file: file.relative_to(path).as_posix())
        if not files:
            raise DataError(f"dataset.path={printable(str(path))}: no .txt file in this folder")
    else:
        files = [path]
    parts = []
    for file in files:
        try:
            parts.append(file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{printable(str(file))}: not UTF-8 (byte {error.start}); convert it, for example with iconv -t UTF-8"
            ) from None
        except OSError as error:
            raise DataError(f"dataset.path={printable(str(file))}: cannot be read ({error.strerror or error})") from None
    if not (text := "".join(parts)):
        raise DataError(f"dataset.path={printable(str(path))}: no text in {names(file.name for file in files[:4])}")
    return text


def require_tokenizers() -> None:
    """Raise an OptionError that says what to install if the package for byte-pair encoding is missing."""
    from importlib.util import find_spec

    if find_spec("tokenizers") is None:
        raise OptionError("unit", "=bpe requires an optional package: pip install fa_bench[text]")


def _byte_pairs(text: str, size: int) -> Encoding:
    """Learn a byte-level byte-pair encoding from a text; the same text always yields the same encoding."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer: Any = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator([text], trainer)
    vocabulary = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    return lambda part: tokenizer.encode(part).ids, vocabulary
