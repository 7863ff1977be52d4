"""The report as one HTML file that opens offline: tables, figures, curves, budgets, provenance, the graph of rules.

:mod:`~masa.report.page.found` reads a results directory, also an unfinished one; the modules beside it turn what it
found into plain data, and ``templates/`` turn that into HTML. Styles, scripts and pictures are inlined, and the page's
Content-Security-Policy forbids every request.

| module | holds |
|---|---|
| ``found`` | what is there, what is missing and the command that makes it |
| ``tables``, ``figures`` | the paper's value beside ours, verdicts; pictures and captions |
| ``curves`` | loss over training of all runs, as data for the chart |
| ``budgets`` | parameters, time and disk |
| ``origins`` | versions, revisions, processors, data |
| ``graph`` | the rules and what each waits for, drawn as SVG |
| ``build``, ``assets`` | the page from all of these; the files that are inlined |
"""
