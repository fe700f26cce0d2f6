import D2CPack
import MLX
import MLXLMCommon
import MLXNN

extension LoRAContainer {
    /// An adapter of a pack, each module in its own rank: mlx-swift replaces parameters without
    /// looking at their shapes, so nothing is padded, and no file is written.
    public init(_ adapter: Adapter) {
        let arrays = adapter.tensors.mapValues { tensor in
            let dtypes: [Tensor.DType: DType] = [
                .float16: .float16, .bfloat16: .bfloat16, .float32: .float32,
            ]
            return MLXArray(tensor.data, tensor.shape, dtype: dtypes[tensor.dtype] ?? .float16)
        }
        let configuration = LoRAConfiguration(
            numLayers: adapter.nLayers, fineTuneType: .lora,
            loraParameters: .init(rank: adapter.rank, scale: Float(adapter.scale), keys: adapter.keys))
        self.init(configuration: configuration, parameters: ModuleParameters.unflattened(arrays))
    }
}

/// Serves the tasks of a pack with one model, whose adapter it changes in place.
///
/// Call it inside `perform` of one `ModelContainer`, which runs one call at a time. A prompt cache from
/// before a change belongs to the old adapter: begin a new one.
public final class TaskSwitch: @unchecked Sendable {
    private let pack: Pack
    private var active: (name: String, container: LoRAContainer)?

    public init(_ pack: Pack) { self.pack = pack }

    /// Make the model serve a task; nil is the base model. The model is the same in every call.
    ///
    /// Throws PackError, which leaves the model as it was, or mlx-swift's error for a model that is
    /// not the pack's base, which leaves the base model.
    public func serve(_ task: String?, with model: any LanguageModel) throws {
        let name = try task.flatMap { try pack.name(for: $0) }
        if name == active?.name { return }
        let next = try task.flatMap { try pack.adapter(for: $0) }.map(LoRAContainer.init)
        // Loading over the old adapter would leave those of its modules active that the new one
        // does not have.
        active?.container.unload(from: model)
        active = nil
        guard let name, let next else { return }
        do {
            try next.load(into: model)
        } catch {
            next.unload(from: model)
            throw error
        }
        active = (name, next)
    }
}
