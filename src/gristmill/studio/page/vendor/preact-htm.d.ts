// Types of what our modules import of preact-htm.js, for `make page`. Nodes are whatever htm makes.
export function html(strings: TemplateStringsArray, ...values: any[]): any;
export function render(node: any, parent: Element): void;
export function useState(initial: any): [any, (value: any) => void];
export function useEffect(effect: () => void | (() => void) | boolean, inputs?: any[]): void;
export function useLayoutEffect(effect: () => void | (() => void) | boolean, inputs?: any[]): void;
export function useRef<T>(initial: T): { current: T };
