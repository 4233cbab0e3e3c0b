# The toy world's rejection-sampling fine-tuning (expert iteration): the best of the supervised
# policy's answers: $ python sample.py --model=out/demo/sft/model --prompts=toy/prompts
#   --num_samples=8 --reward_model=out/demo/reward/model --max_new_tokens=64 --write=sft
#   --out=out/demo/best.jsonl
out_dir = "out/demo/rft"
init_from = "out/demo/sft/model"
data = "out/demo/best.jsonl"
epochs = 2.0
batch_size = 32
learning_rate = 1e-3
save_interval = 0
