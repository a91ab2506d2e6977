"""Low-rank adapters: what one changed (`probe lora ADAPTER`), and what a rank buys (`probe lora sweep`).

files → spectrum → base       an adapter's factors; singular values of B A from the factors; against W
data → sweep → findings       lines of an invented language (`tarn/`); trainings, kept on disk, resumable; what they
                              say at the end, at matched loss and at matched norm
page                          a sweep as tables and as a picture
compare                       two runs, before and after fine-tuning, task by task
"""
