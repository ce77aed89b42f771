"""Chat templates in the styles of the families, short and our own; texts and conversations for every reader."""

_PROMPT = "{% if add_generation_prompt %}"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}" + _PROMPT + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
CHATML_THINKING = (
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\n' }}\n"
    "    {{- message.content + '<|im_end|>\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\n\n</think>\n\n' }}\n    {%- endif %}\n{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}" + _PROMPT + "<|start_header_id|>assistant<|end_header_id|>"
    "\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}" + _PROMPT + "<start_of_turn>model\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }}"
    "[/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    + _PROMPT
    + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<｜User｜>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<｜Assistant｜>{{ message['content'] }}<｜end▁of▁sentence｜>{% else %}"
    "{{ message['content'] }}{% endif %}{% endfor %}" + _PROMPT + "<｜Assistant｜>{% endif %}"
)
GRANITE = (
    "{% for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>{{ message['content'] }}"
    "<|end_of_text|>\n{% endfor %}" + _PROMPT + "<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    + _PROMPT
    + "{{ '<|assistant|>\n' }}{% endif %}"
)
HARMONY = (
    "{% for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor %}"
    + _PROMPT
    + "<|start|>assistant{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    + _PROMPT
    + "{{ 'assistant:\n' }}{% endif %}"
)
"""For bases without a template: it needs no token but the end token."""

TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\ttabs\tand  spaces ",
    "The capital of France is Paris.",
    "  What is two plus two?",
    "The answer is four, isn't it? I don't know; you'll see.   ",
    "WE'VE SOLD IT, THEY'RE GONE!",
    "In 2024 there were 12345 apples and 45 pears, at 12.50 each.",
    "1234567890 1 12 123 1234 0.5e-10 -7 ½ ² ٣٤",
    "def add_two(numberOne, numberTwo):\n    return numberOne + numberTwo  # sum\n",
    'print(add_two(12, 30));\n\n\n{"name": "value"}, [1, 2, 3]...',
    "camelCase snake_case SCREAMING_CASE XMLHttpRequest",
    "<div class='a'>&amp;</div>",
    "Où est l'été? Zoë über naïve café, déjà vu.",
    "e\u0301te\u0301 Zo\u0308e \ufb01n \uff21\uff22",
    "Привет, мир! Γειά σου Κόσμε",
    "你好，世界。これはテストです。한국어 문장",
    "مرحبا بالعالم שלום עולם",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 ❤️ and a flag 🇫🇷",
    "a\u00a0b\u200bc\u3000d\ufeffe",
    "\x00\x01\x7f",
    "carriage\r\nreturn\r",
    "... ,, ;; !! ?? ' \" `",
    "don't can't won't it's I'm we'd O'Neil 'quoted'",
    "user: what is the answer? assistant: the answer is four.",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "text <|endoftext|> text<|endoftext|>text <|end_of_text|>",
    "<s>a</s> <s> b </s> [INST] c [/INST] <unk>",
    "<bos>a<eos><start_of_turn>user\nb<end_of_turn>\n<pad><mask>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>",
    "<think>\nreasons\n</think>\n\n<tool_call>{}</tool_call>",
    "<|user|>\nquestion<|end|>\n<|assistant|>\n answer <|system|>  x",
    "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜>",
    "<|start|>user<|message|>a<|return|> <|start_of_role|>b<|end_of_role|> <|extra_id_0|> <|pad|>",
    "▁under ▁▁score ▁ <0x0A> Ġ Ċ <table>  \n\n\n <image_soft_token>",
    "one two three four five six " * 8,
    " leading and trailing \n",
)
"""What tokenizers differ in."""

CONVERSATIONS = (
    ({"role": "user", "content": "What is two plus two?"},),
    (
        {"role": "user", "content": " Où est l'été? 😀 "},
        {"role": "assistant", "content": "The answer is four.\n"},
        {"role": "user", "content": "In 2024?"},
    ),
    ({"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}),
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<b>5 > 3 & 2</b>\n\nwhy?"},
        {"role": "assistant", "content": "  It is.  "},
    ),
)
"""Messages to render, with and without a generation prompt."""
