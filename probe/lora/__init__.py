"""Low-rank adapters: what one changed (`probe lora ADAPTER`), and what a rank buys (`probe lora sweep`).

files → spectrum → base       an adapter's factors; singular values of B A from the factors; against W
sweep → findings → plot       trainings on an invented language (`tarn/`), kept on disk, resumable; what they say at
                              the end, at matched loss and at matched norm
compare                       two runs, before and after fine-tuning, task by task
"""
