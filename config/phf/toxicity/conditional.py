# Conditional training: a control token before each segment.
# For nanosafe/phf/train.py, after pretrain.py:
# $ torchrun ... -m nanosafe.phf.train config/phf/toxicity/pretrain.py \
#     config/phf/toxicity/conditional.py
# Upstream starts the embeddings of the two control tokens near the mean of the others. Here a model
# from scratch starts all embeddings at random.
objective = "conditional"
score_threshold = 0.00056
drop_fraction = 0.01
