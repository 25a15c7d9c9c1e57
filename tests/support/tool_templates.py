"""Chat templates that do what some models' own do about calls of tools, and little else."""

# What Mistral's templates do, of the years 2024, early 2025 and late 2025.
MISTRAL_LIST = """
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}
        {%- endfor %}{{ ']</s>' }}
    {%- elif message.role == 'tool' %}
        {%- set id = message.tool_call_id %}
        {%- if id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + id + '"}' }}
    {%- else %}{{ message.content + '</s>' }}{% endif %}
{%- endfor %}"""

MISTRAL_IDS = """
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
    {%- for call in message.tool_calls or [] %}
        {%- if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}
        {{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id }}
        {{- '[ARGS]' + call.function.arguments | tojson }}
    {%- endfor %}{{ '[' + message.role + ']' + message.content }}
{%- endfor %}"""

MISTRAL = """
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}{{ '[' + message.role + ']' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
    {%- endfor %}
{%- endfor %}"""

# Gemma 4's, and how its first version wrote what calls returned.
GEMMA_HEAD = """
{%- macro value(it) %}
    {%- if it is string %}{{ '<|"|>' + it + '<|"|>' }}
    {%- elif it is mapping %}{{ '{' }}{% for key, one in it | dictsort %}{{ key }}:{{ value(one) }}
        {{- ',' if not loop.last }}{% endfor %}{{ '}' }}
    {%- else %}{{ it }}{% endif %}
{%- endmacro %}
{%- for t in tools or [] %}{{ '<|tool>declaration:' + t.function.name + '{}<tool|>' }}{% endfor %}
{%- for message in messages %}"""
GEMMA_CALLS = """
    {%- for call in message.tool_calls or [] %}
        {{- '<|tool_call>call:' + call.function.name + value(call.function.arguments) + '<tool_call|>' }}
    {%- endfor %}"""
GEMMA_RESULT = """{{ '<|tool_response>response:' + name + '{value:' + value(text) + '}<tool_response|>' }}"""
GEMMA = (
    GEMMA_HEAD
    + GEMMA_CALLS
    + "{%- if message.role == 'tool' %}{% set name = message.name %}{% set text = message.content %}"
    + GEMMA_RESULT
    + "{%- else %}{{ '<|turn>' + message.role + message.content + '<turn|>' }}{% endif %}{% endfor %}"
)
GEMMA_FIRST = (
    GEMMA_HEAD
    + "{{ '<|turn>' + message.role }}"
    + GEMMA_CALLS
    + "{%- for one in message.tool_responses or [] %}{% set name = one.name %}{% set text = one.response %}"
    + GEMMA_RESULT
    + "{%- endfor %}{{ message.content + '<turn|>' }}{% endfor %}"
)

# Qwen3-Coder's.
QWEN_CODER = """
{%- if tools %}{{- '<tools>' }}{%- for tool in tools %}{{- '<name>' + tool.function.name + '</name>' }}
    {%- endfor %}{{- '</tools>' }}{%- endif %}
{%- for message in messages %}
    {{- '[' + message.role + ']' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for key, value in call.function.arguments | items %}
            {{- '<parameter=' + key + '>\\n' }}
            {{- value | tojson if value is mapping else value | string }}{{- '\\n</parameter>\\n' }}
        {%- endfor %}{{- '</function>\\n</tool_call>' }}
    {%- endfor %}
{%- endfor %}"""
