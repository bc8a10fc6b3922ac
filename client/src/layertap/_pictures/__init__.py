"""Pictures of attention maps and hidden states: a page, a terminal, matplotlib, bertviz."""
