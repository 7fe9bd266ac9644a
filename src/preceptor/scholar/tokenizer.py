"""The scholar's vocabulary and shape: a folder that holds a tokenizer and a `config.json`, and no weights.

`python -m preceptor.scholar.tokenizer --library FILE --out FOLDER` makes it; a run file with
`model: {path: FOLDER, init: random}` then draws the weights with the run's seed.

Byte-level BPE (Sennrich et al., 2016, over bytes), learned on the library. A true base model's: `<|endoftext|>` ends
a document; there is no chat template, no chat token, and no pad token, since nothing here pads.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 4096
MAX_POSITIONS = 1024
# Words with their space before them, digits and punctuation marks one by one (numbers are then spelled in one way
# only), line ends. Without this split BPE would glue ".pdf" or "404" together and learn each number as a word.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"


def learn_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def model_config(eos_token_id: int) -> Qwen3Config:
    """Qwen3 with 4.5 M parameters, tied."""
    return Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,  # the usual 0.02 is meant for wider models; 256 wide, it begins slowly
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        architectures=["Qwen3ForCausalLM"],
        dtype="float32",
    )


def _texts(library: Path) -> Iterator[str]:
    with library.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn the scholar's tokenizer and write its empty model folder.")
    parser.add_argument("--library", type=Path, required=True, help="JSON lines that preceptor.scholar.library wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    tokenizer = learn_tokenizer(_texts(arguments.library))
    tokenizer.save_pretrained(arguments.out)
    model_config(tokenizer.eos_token_id).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
