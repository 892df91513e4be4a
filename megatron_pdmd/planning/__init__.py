"""What a layout costs: formulas, held against what is counted."""
