"""Values that mean something where they are put: kinds of models, names of results, chat templates."""

from __future__ import annotations

from tests.fuzz.seeds import FACTORS, MASKS, RANKS

CONFIG_WORDS = (
    "llama", "gpt2", "qwen3", "mistral", "gemma3_text", "phi3", "opt", "t5", "bert", "mamba", "xlstm", "llava",
    "whisper", "vit", "qwen3_moe", "deepseek_v3", "float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "silu",
    "gelu", "quick_gelu", "yarn", "linear", "dynamic", "llama3", "longrope", "default", "full_attention",
    "sliding_attention", "eager", "sdpa", "flash_attention_2", "LlamaForCausalLM", "LlamaModel", "GPT2LMHeadModel",
    {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear"}, {"quant_method": "bitsandbytes"},
    {"quant_method": "ara"}, {"quant_method": "gptq", "bits": 4}, [1, 2], 10**5, 10**7, 10**9,
)  # fmt: skip

TOKENIZER_WORDS = (
    "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer", "TokenizersBackend",
    "BPE", "WordPiece", "Unigram", "WordLevel", "ByteLevel", "Metaspace", "NFC", "Sequence", "Split", "Precompiled",
    "<bos>", "<eos>", 260, 10**6, {"type": "Sequence", "normalizers": []}, {"content": "<x>", "special": True},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}, {"type": "Lowercase"},
    {"type": "Prepend", "prepend": "x"},
)  # fmt: skip

MANIFEST_WORDS = (
    "decompose", "allocate", "truncate", f"decompose/{FACTORS}", f"train-masks/{MASKS}", f"allocate/{RANKS}",
    f"truncate/{RANKS}", "energy", "uniform", "two-sided", "factors", "pivoted", "float32", "0" * 64, "ara status",
    "2024-01-01T00:00:00+00:00", 0.7, 24, 40,
)  # fmt: skip

TEMPLATES = (
    "{{ messages[0].content }}", "{{ messages }}", "", "x", "{{ raise_exception('no') }}", "{{ 1/0 }}",
    "{{ undefined_name }}", "{{ undefined.attribute }}", "{{ messages[9].content }}",
    "{{ messages[0]['content'] + 1 }}", "{% for m in messages %}", "{{", "{% if %}{% endif %}", "{% include 'x' %}",
    "{% import 'os' as os %}", "{% extends 'x' %}", "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os }}", "{{ lipsum(n=5) }}",
    "{{ 'x' * 10**7 }}", "{{ 'x' * 10**10 }}", "{{ 'x' * 2**62 }}", "{{ 9**9**9 }}",
    "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "{% for i in range(200000) %}xy{% endfor %}", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ messages|tojson(indent=10**8) }}", "{{ messages|pprint }}", "{{ 'a'|center(10**9) }}",
    "{{ '%1000000000d'|format(1) }}", "{{ '{:>1000000000}'.format(1) }}", "{{ 'a'|nofilter }}", "{{ 'a' is notest }}",
    "{{ strftime_now('%Y') }}", "{{ strftime_now(7) }}", "{{ strftime_now('%') }}", "{{ 'a'.encode() }}",
    "{{ messages.append(1) }}{{ messages }}",
    "{% set x = [0] %}{% for i in range(40) %}{% set _ = x.extend(x) %}{% endfor %}", "{% break %}", "{% continue %}",
    "{% generation %}x{% endgeneration %}", "{{ namespace(a=1).b.c }}", "{{ [1]|first|length }}",
    "{{ messages|map(attribute='content')|join('\x00') }}", "\x00", "\ud800", "{{ '\\ud800' }}", "{# open",
    "{{ bos_token * 10**6 }}", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{{ (1).__add__ }}", "{{ 'a' ~ 10**5000 }}", "((" * 3000, "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500, "{{ messages[0].content|upper|trim }}", "{{ messages|sum }}",
    "{{ range(5)|batch(0)|list }}", "{{ 'abc'|wordwrap(0) }}", "{{ 'a b c'|truncate(1) }}", "{{ 1.0|round(400) }}",
    "{{ debug() }}", "{{ self }}", "{{ caller() }}", "{{ messages|random }}", "{{ ''.join(['a'] * 10**8) }}",
    "{{ 'a'|indent(10**9) }}",
)  # fmt: skip
