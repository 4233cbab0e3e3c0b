from config.phf.pii.pretrain import *  # the second half of the tokens

out_dir = "out/phf/pii_finetune"
init_from = "out/phf/pii/model"
learning_rate = 1e-4
batch_size = 128  # awr and rwr: --batch_size=512 --max_steps=3147
max_steps = 12588
