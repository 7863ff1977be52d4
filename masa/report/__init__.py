"""Tables and figures from metrics files; no model is ever loaded here."""
