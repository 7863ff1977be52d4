"""The text of the model card, as a Jinja template: front matter, tables, and what every card says."""

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ summary }}

| | |
|---|---|
{% for key, value in facts.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
## How to load it

masa is not needed. In this folder:

```python
{{ usage }}```

## Data

{% if data -%}
| | |
|---|---|
{% for key, value in data.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
{% endif -%}
{% for note in data_notes -%}
{{ note }}

{% endfor -%}
## Recipe

{% if recipe -%}
| | |
|---|---|
{% for key, value in recipe.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
{% else -%}
Not known: this folder was exported from a checkpoint without a run.

{% endif -%}
## Metrics

{% if scores -%}
{% if evaluated_on %}{{ evaluated_on }}

{% endif -%}
| data | metric | value | standard error | examples |
|---|---|---|---|---|
{% for row in scores -%}
| {{ row.data }} | {{ row.label }} | {{ row.value }} | {{ row.error or "" }} | {{ row.examples or "" }} |
{% endfor %}
{{ measured }}
{%- else -%}
Not evaluated{% if trained %}, beyond what its training measured{% endif %}.
{%- endif %}
{% if trained %}
| at the end of training | |
|---|---|
{% for key, value in trained.items() -%}
| {{ key }} | {{ value }} |
{% endfor -%}
{% endif %}
{%- for note in metric_notes %}
{{ note }}
{% endfor %}
## Provenance

{% if provenance -%}
| | |
|---|---|
{% for key, value in provenance.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
{% else -%}
Not known.

{% endif -%}
{% for line in handed_on -%}
{{ line }}

{% endfor -%}
Exported by masa {{ version }} at revision {{ revision }}; `export.json` holds every file's sha256.

## Limits

{% for line in limits -%}
- {{ line }}
{% endfor %}
## Licence

masa, which made this model, is Apache-2.0. That says nothing of the weights: what they may be used for follows from the
licence of the data{% if compressed %} and of the model that was compressed{% endif %}, which masa does not know.
{%- if license == "unknown" %} Find out before you share them, and state it above.{% endif %}

## Citation

```bibtex
@article{zhussip2025share,
  title  = {Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning},
  author = {Zhussip, Magauiya and Shopkhoev, Dmitriy and Ali, Ammar and Lefkimmiatis, Stamatios},
  year   = {2025},
  url    = {https://arxiv.org/abs/2508.04581}
}
```

"""
