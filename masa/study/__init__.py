"""The study that is built on the core: its configuration, experiments, tables and figures as data, costs and status."""
