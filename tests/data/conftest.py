"""A tiny byte-level tokenizer, made here, and chat templates of the families in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "What does shutil.copytree do in Python? It copies a whole folder.",
    "The quick brown fox jumps over the lazy dog, said the assistant to the user.",
    "You are a helpful system. Hello there, how are you today? Fine, thank you.",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|start|>", "<|end|>", "[INST]", "[/INST]"]

CHATML = """{% for message in messages %}{{ '<|start|>' + message['role'] + '
' + message['content'] + '<|end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant
' }}{% endif %}"""

LLAMA3 = """{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ '<|start|>' + message['role'] + '<|start|>

' + message['content'] | trim + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|start|>

' }}{% endif %}"""

# no generation prompt at all, strict alternation
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}{{ '<|start|>' + ('model' if message['role'] == 'assistant' else 'user') + '
' + message['content'] | trim + '<|end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>model
' }}{% endif %}"""

# only the last answer shows its thoughts
QWEN3 = """{% for message in messages %}{% if message['role'] == 'assistant' and loop.last %}{{ '<|start|>assistant
<think>

</think>

' + message['content'] + '<|end|>
' }}{% else %}{{ '<|start|>' + message['role'] + '
' + message['content'] + '<|end|>
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant
' }}{% endif %}"""

# the generation prompt opens the thoughts, a finished turn does not hold them
DEEPSEEK = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|start|>' + message['content'] + '<|end|>' }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|><think>
' }}{% endif %}"""

GENERATION = """{% for message in messages %}{{ '<|start|>' + message['role'] + '
' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{{ '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant
' }}{% endif %}"""

TOOLS = """{% if tools %}{{ '<|start|>tools' }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ '<|end|>' }}{% endif %}{% for message in messages %}{{ '<|start|>' + message['role'] + '
' }}{% if message.tool_calls %}{% for call in message.tool_calls %}{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}{% else %}{{ message['content'] }}{% endif %}{{ '<|end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant
' }}{% endif %}"""


# a field for thoughts, which only the last answer shows, and blocks
THINKING = GENERATION.replace(
    "{% generation %}{{ message",
    "{% generation %}{% if loop.last and message.reasoning_content %}{{ '<t>' + message.reasoning_content + '</t>' }}{% endif %}{{ message",
)

# an answer begins behind its thoughts, as in DeepSeek-R1
CUT_THOUGHTS = DEEPSEEK.replace(
    "message['content'] + '<|end|>'", "message['content'].split('</think>')[-1] + '<|end|>'"
)

# ids of calls have nine letters and digits, as in Mistral's
NINE = """{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for message in messages %}{{ '<|start|>' + message['role'] + message['content'] }}{% for call in message.tool_calls %}{% if call.id is not defined or call.id | length != 9 or '_' in call.id %}{{ raise_exception('ids have nine letters and digits') }}{% endif %}{{ call.function.name + ' ' + call.id + ' ' }}{% endfor %}{% if message.role == 'tool' %}{{ message.tool_call_id }}{% endif %}{{ '<|end|>' }}{% endfor %}"""

# a newline inside the block, as in the templates that TRL trains with
NEWLINE = GENERATION.replace("+ '<|end|>' }}{% endgeneration %}", "+ '<|end|>\n' }}{% endgeneration %}")

# an eos after the last turn, as in Phi-3
EOS_LAST = CHATML.replace(
    "{% if add_generation_prompt %}", "{% if not add_generation_prompt %}{{ eos_token }}{% else %}"
)

# two tokens end a turn, as in Cohere2
TWO_ENDS = CHATML.replace("'<|end|>\n'", "'<|end|></s>'")

# earlier turns end otherwise than the last, as in gpt-oss
OTHER_END = CHATML.replace("+ '<|end|>\n'", "+ ('</s>' if loop.last and message['role'] == 'assistant' else '<|end|>')")

# nothing ends a turn but the next one, as in GLM
NO_END = """{% for message in messages %}{{ ('<|start|>' if message['role'] == 'assistant' else '[INST]') + '
' + message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>' }}{% endif %}"""

# the system text stands in the last turn, if that is the user's, as in Mistral v0.3
MOVED_SYSTEM = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for message in turns %}{% if message['role'] == 'user' %}{{ '[INST] ' + (system + '

' if loop.last and system else '') + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""

# content is read as parts alone, as in Idefics3
PARTS = CHATML.replace("message['content']", "message['content'][0]['text']")


# a call ends otherwise than an answer, and only the first is written, as in gpt-oss
CALL_ENDS = (
    TOOLS.replace("in message.tool_calls %}", "in message.tool_calls[:1] %}")
    .replace(
        "(call.function.arguments | tojson) }}{% endfor %}",
        "(call.function.arguments | tojson) + '</s>' }}{% endfor %}",
    )
    .replace("{{ '<|end|>\n' }}{% endfor %}", "{{ '' if message.tool_calls else '<|end|>\n' }}{% endfor %}")
)

# what opens a result ends the calls, as in Gemma 4
RESULT_OPENS = TOOLS.replace(
    "{{ '<|end|>\n' }}{% endfor %}", "{{ '[INST]' if message.tool_calls else '<|end|>\n' }}{% endfor %}"
)

# nothing ends a turn but the next one, which is another behind calls, as in GLM; a call's own end is no turn's
RESULT_FOLLOWS = """{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for message in messages %}{{ {'assistant': '<|start|>', 'tool': '[/INST]'}.get(message['role'], '[INST]') + message['content'] }}{% for call in message.tool_calls %}{{ '<s>' + call.function.name + (call.function.arguments | tojson) + '</s>' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>' }}{% endif %}"""

# each call ends with a token, and the turn with another
EACH_CALL_ENDS = TOOLS.replace(
    "(call.function.arguments | tojson) }}", "(call.function.arguments | tojson) + '</s>' }}"
)

# what ends calls ends the thoughts of every answer as well
THOUGHTS_END = TOOLS.replace(
    "{% if message.tool_calls %}", "{{ '</s>' if message['role'] == 'assistant' }}{% if message.tool_calls %}"
)

# an answer has parts that end alike, and the turn ends with another token, as in Kimi K3
PARTS_END = TOOLS.replace("{{ '<|end|>\n' }}{% endfor %}", "{{ '</s>text</s>turn<|end|>\n' }}{% endfor %}")

# last calls are written otherwise than earlier ones, as in Apriel
REWRITTEN_CALLS = "{{ bos_token }}" + RESULT_FOLLOWS.replace("+ '</s>' }}", "+ ('' if loop.last else 'id') }}").replace(
    "[/INST]", "[INST]"
).replace(
    "(call.function.arguments | tojson)",
    "('' if messages[-1] == message else 'id') + (call.function.arguments | tojson)",
)

# a turn that calls holds its results, the text beside the calls behind them, and the next answer, as in Gemma 4
RESULT_IN_TURN = """{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|start|>user
' + message['content'] + '<|end|>
' }}{% elif message['role'] == 'assistant' %}{% if messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|start|>model
' }}{% endif %}{% for call in message.tool_calls %}{{ call.function.name + (call.function.arguments | tojson) + '[INST]' }}{% endfor %}{% if message.tool_calls and loop.nextitem %}{{ loop.nextitem['content'] + '[/INST]' }}{% endif %}{{ message['content'] }}{% if loop.last or messages[-1]['role'] == 'tool' %}{{ '<|end|>
' }}{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>model
' }}{% endif %}"""

# a result may stand behind calls alone, as in Mistral Nemo
RESULT_AFTER_CALLS = TOOLS.replace(
    "{{ '<|start|>' + message['role']",
    "{% if message['role'] == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}{{ '<|start|>' + message['role']",
)

# what others say is shown under conditions: a system text at the beginning, of users in a row the last, no results
FORGETFUL = CHATML.replace(
    "{{ '<|start|>'",
    "{% if message['role'] == 'system' and not loop.first or message['role'] == 'user' and not loop.last and loop.nextitem['role'] == 'user' %}{% continue %}{% endif %}{{ '<|start|>'",
    1,
)
LAST_SYSTEM = (
    """{% for message in messages if message['role'] == 'system' %}{% if loop.last %}{{ message['content'] }}{% endif %}{% endfor %}{% set messages = messages | rejectattr('role', 'equalto', 'system') %}"""
    + CHATML
)
NO_RESULTS = TOOLS.replace(
    "{{ '<|start|>' + message", "{% if message.role == 'tool' %}{% continue %}{% endif %}{{ '<|start|>' + message"
)

# no special token at all, as in Alpaca's
PLAIN_TEXT = """{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


def make_tokenizer(template: str | None = CHATML, pad: str = "<pad>", adds_bos: bool = False) -> Any:
    """Byte-level BPE of some 350 tokens. ``adds_bos``: every text begins with <s>, as Llama's tokenizers have it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=350,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """``write("a.jsonl", [records])`` → the path, as text."""

    def _write(name: str, content: Any) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in content), encoding="utf-8")
        return str(path)

    return _write
