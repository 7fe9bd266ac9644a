"""The scholar's tokenizer and model configuration, without weights.

A run file with `model: {path: FOLDER, init: random}` draws the weights with the run's seed.

Byte-level BPE (Sennrich et al., 2016, over bytes), learned on the library. A true base model's: `<|endoftext|>` ends
a document; there is no chat template, no chat token, and no pad token, since nothing here pads.
"""

from collections.abc import Iterable

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
