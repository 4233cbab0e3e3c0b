# A judge that PPO never sees: the other half of the data, more pairs, and the instruct
# model instead of the SFT model. For train_pref.py, after the recipe of the model that it judges:
# $ python train_pref.py config/smollm2/reward.py config/smollm2/judge.py
# $ python train_pref.py config/smollm2/reward.py config/smollm2/cost.py config/smollm2/judge.py
init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
data = "pku_saferlhf/halves/judge:2000/-1"
