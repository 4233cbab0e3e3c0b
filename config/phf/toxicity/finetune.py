from config.phf.toxicity.pretrain import *  # the second half of the tokens

out_dir = "out/phf/toxicity_finetune"
init_from = "out/phf/toxicity/model"
max_steps = 25177  # awr and rwr: --batch_size=512 --max_steps=3147
