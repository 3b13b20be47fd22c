"""Pictures, charts, tables and widgets of the reports, in one style; each says in words what it
shows. They return figures and numbers, never conclusions: those stand in the notebooks."""
