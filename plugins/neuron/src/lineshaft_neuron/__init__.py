"""The AWS Neuron backend: one compiled program per bucket, on Neuron cores or on a stand-in for them."""
