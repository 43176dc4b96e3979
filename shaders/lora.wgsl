// lora
