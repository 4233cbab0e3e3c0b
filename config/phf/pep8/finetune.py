from config.phf.pep8.pretrain import *  # the second half of the tokens

out_dir = "out/phf/pep8_finetune"
init_from = "out/phf/pep8/model"
max_steps = 25177  # awr: --max_steps=6294
