"""Low-rank adapters: what one changed (`probe lora ADAPTER`), and what a rank buys (`probe lora sweep`).

files → spectrum → base       an adapter's factors; singular values of B A from the factors; against W
data → training → sweep       lines of an invented language; one trained cell; cells on disk, resumable
findings → page               what the cells say, at matched loss and matched norm; the report
compare                       two runs, before and after fine-tuning, task by task
"""
