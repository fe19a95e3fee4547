"""The parts of `tools/train_demo_model.py`: music, codec, decoder, clips and checks."""
