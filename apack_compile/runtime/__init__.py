"""What runs between Dynamo's bytecode and Inductor's code: handles in, plain tensors through."""
