"""The verbs of the command line, a file a group. A new verb is one ``verbs.add`` in one of them, or a new file here."""

from masa.verbs import compare, compress, data, export, page, plan, report, status, train

MODULES = (data, train, compress, export, report, page, compare, status, plan)
"""In the order of ``masa --help``; each has ``add(verbs)``."""
